"""The guest's serial console. The last 256 KiB of its output stay in memory."""

from __future__ import annotations

import socket

from smolvm_async.foundation.tail import Reader, Tail

LIMIT = 256 * 1024  # bytes of the output that stay in memory; the guest may write more


class Console(Tail):
    """The console's last output, read from a socketpair. QEMU has inherited the other end."""

    def __init__(self) -> None:
        super().__init__(LIMIT)
        self._reader: Reader | None = None

    def open(self) -> socket.socket:
        """Start reading and return QEMU's end. The caller closes it once QEMU has it."""
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
