"""The guest's serial console: the last part of it, in memory, however much the guest writes."""

from __future__ import annotations

import asyncio
import contextlib
import socket

LIMIT = 256 * 1024  # bytes that are kept


class Console:
    """Reads the serial console from a socketpair whose other end QEMU has inherited."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: socket.socket | None = None

    def open(self) -> socket.socket:
        """Start reading; returns QEMU's end, which the caller closes once QEMU has it."""
        self._kept.clear()
        ours, qemus = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(ours.fileno(), self._read)
        return qemus

    def drain(self) -> None:
        """Read what is still there, within reason: the guest may be writing without end."""
        for _ in range(16):
            if self._socket is None or not self._read():
                break

    def close(self) -> None:
        """Read what is still there, and stop."""
        self.drain()
        self._stop()

    def text(self, limit: int = LIMIT) -> str:
        """The last `limit` bytes, as text."""
        return bytes(self._kept[-limit:]).decode(errors="replace")

    def _read(self) -> bool:
        assert self._socket is not None
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._stop()
            return False
        self._kept += data
        del self._kept[:-LIMIT]
        return True

    def _stop(self) -> None:
        if self._socket is not None and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
