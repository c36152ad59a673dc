"""The guest's serial console: the end of its output, kept in memory."""

from __future__ import annotations

import socket

from smolvm_async.foundation.tail import Reader, Tail

LIMIT = 256 * 1024  # bytes that are kept, however much the guest writes


class Console(Tail):
    """Reads the serial console from a socketpair whose other end QEMU has inherited."""

    def __init__(self) -> None:
        super().__init__(LIMIT)
        self._reader: Reader | None = None

    def open(self) -> socket.socket:
        """Start reading and return QEMU's end, which the caller closes once QEMU has it."""
        ours, qemus = socket.socketpair()
        self._reader = Reader(ours.detach(), self)
        return qemus

    def drain(self) -> None:
        """Read the unread output, up to a limit: the guest may write without end."""
        if self._reader is not None:
            self._reader.drain()

    def close(self) -> None:
        """Read the unread output, and stop reading."""
        if self._reader is not None:
            self._reader.close()
