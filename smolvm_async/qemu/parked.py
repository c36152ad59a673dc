"""The host's end of the parked process, which sets a restored guest right.

A guest that is restored from a snapshot has the random numbers, the clock, the name and the keys of
the guest that the snapshot was taken of. In the built-in Linux, a process has waited on a port
since the boot (`images/build/debian/guest/parked.pl` describes its protocol). It gets its message
right after the restore, and its answer is the restored guest's first sign of life.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time

from smolvm_async.foundation.tail import Reader, Tail, printable
from smolvm_async.guests import GuestProfile

LIMIT = 4096  # bytes of the guest's answers that stay in memory; the guest may write more
SEED = 64  # bytes of new entropy
ENDED = "QEMU has ended"
PARKED, RIGHT = "parked", "right"  # the guest's lines


def make_parked(profile: GuestProfile) -> Parked | None:
    """Return the host's end for a guest that has the process."""
    return Parked() if profile.login == "fw_cfg" else None


class Parked(Tail):
    """The guest's lines, read from a socketpair. QEMU has inherited the other end."""

    def __init__(self) -> None:
        super().__init__(LIMIT)
        self._fd = -1
        self._reader: Reader | None = None
        self._read = 0  # bytes of the stream

    def open(self) -> socket.socket:
        """Start reading and return QEMU's end. The caller closes it once QEMU has it."""
        ours, qemus = socket.socketpair()
        self._fd = ours.detach()
        self._reader = Reader(self._fd, self)
        return qemus

    def close(self) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.close()

    async def wait_parked(self, timeout: float) -> str:
        """Wait until the process is parked: after `timeout` seconds, return why it is not."""
        return (await self._wait_line(timeout, PARKED, skip=RIGHT))[0]

    async def set_right(
        self, name: str, host_key: bytes, authorized_keys: bytes, *, timeout: float
    ) -> tuple[str, bool]:
        """Give the guest new random numbers, the right time, a name and keys.

        Call it right after `cont`. The guest first reseeds, and at last makes its SSH server use
        the host key.

        Args:
            name: The guest's host name.
            host_key: The SSH server's private key.
            authorized_keys: The content of the user's authorized_keys.
            timeout: Seconds for the answer.

        Returns:
            The reason if the guest was not set right, else ""; and whether it has the new name and
            keys, which it also has if only the random numbers could not be reseeded.
        """
        assert self._reader is not None
        keys = f"{host_key.hex()} {authorized_keys.hex()}"
        message = f"{os.urandom(SEED).hex()} {time.time():.6f} {name} {keys}\n"
        self._reader.drain()
        self._read += self.since(self._read).rfind(b"\n") + 1  # skip what is no answer to this
        try:
            # The socket's buffer takes the whole message: only this method writes to it.
            if not self._reader.ended.done():
                os.write(self._fd, message.encode())
        except OSError as error:
            return f"its parked process does not read: {error.strerror}", False
        return await self._wait_line(timeout, RIGHT, skip=PARKED)

    async def _wait_line(self, timeout: float, expected: str, skip: str) -> tuple[str, bool]:
        """Return the next line, or "" if it is `expected`; and whether there was a line."""
        try:
            async with asyncio.timeout(timeout):
                while (line := await self._next_line()) == skip:
                    pass
        except TimeoutError:
            return f"its parked process did not answer within {timeout:g} s", False
        if line is None:
            return ENDED, False
        return "" if line == expected else line, True

    async def _next_line(self) -> str | None:
        """Return the next line; `None` if QEMU has ended."""
        assert self._reader is not None
        ended, news = self._reader.ended, asyncio.Event()
        ended.add_done_callback(lambda _: news.set())
        self.listeners.add(news)
        try:
            while True:
                self._read = max(self._read, self.count - self.limit)
                line, newline, _ = self.since(self._read).partition(b"\n")
                if newline:
                    self._read += len(line) + 1
                    return printable(line.decode(errors="replace"))
                if ended.done():
                    return None
                news.clear()
                await news.wait()
        finally:
            self.listeners.discard(news)
