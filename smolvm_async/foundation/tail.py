"""The last bytes of a stream of any length, such as a serial console or a log."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

from smolvm_async.foundation.fork import private, this_process

CHUNK = 65536
QUOTED = 4096  # bytes of a stream that an error message quotes
CONTROL = r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b.?|[^\n\t\x20-\x7e\xa0-\U0010ffff]"


def printable(text: str) -> str:
    """Remove terminal control sequences from `text`: the guest may have written the text.

    Bytes of a file name that are not UTF-8 become escape sequences of Python.
    """
    return re.sub(CONTROL, "", text).encode(errors="backslashreplace").decode()


class Tail:
    """The last `limit` bytes of a stream.

    Attributes:
        count: The number of bytes in the whole stream so far.
        listeners: Events to set when bytes arrive.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.listeners: set[asyncio.Event] = set()
        self._kept = bytearray()

    def feed(self, data: bytes) -> None:
        """Append `data`, and drop the oldest bytes beyond the limit."""
        self._kept += data
        self.count += len(data)
        del self._kept[: -self.limit]
        for listener in self.listeners:
            listener.set()

    def since(self, count: int) -> bytes:
        """Return the kept bytes that follow the first `count` bytes of the stream."""
        return bytes(self._kept[-(self.count - count) :]) if count < self.count else b""

    async def follow(self, over: asyncio.Future[None]) -> AsyncIterator[str]:
        """Yield the kept text, then new text as it arrives, until `over` is done."""
        process, news = this_process(), asyncio.Event()
        self.listeners.add(news)
        if not over.done():  # else its event loop may be closed
            over.add_done_callback(lambda _: news.set())
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        read = max(0, self.count - self.limit)
        try:
            while True:
                news.clear()
                final = over.done()
                data, read = self.since(read), self.count
                if text := decoder.decode(data, final):
                    yield text
                if final:
                    return
                process.check("this console", "Attach to the VM with from_id().")
                await news.wait()
        finally:
            self.listeners.discard(news)

    def text(self, limit: int | None = None) -> str:
        """Return the last `limit` bytes as text; by default, all kept bytes."""
        return bytes(self._kept[-(limit or self.limit) :]).decode(errors="replace")

    def close(self) -> None:
        """Do nothing: there is no file."""

    def quote(self) -> str:
        """Return the end of the stream for an error message: only printable text, stripped."""
        return printable(self.text(QUOTED)).strip()


class LogFile(Tail):
    """The end of a process's output, in memory and in a file.

    The file holds at most twice `limit` bytes. On a full disk, only the copy in memory is complete.
    """

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(limit)
        self.path = path
        self._written = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o600)

    def feed(self, data: bytes) -> None:
        """Append `data` in memory and to the file."""
        super().feed(data)
        with contextlib.suppress(OSError):
            if self._written + len(data) > 2 * self.limit:
                os.ftruncate(self._file, 0)
                os.lseek(self._file, 0, os.SEEK_SET)
                data, self._written = self.since(0), 0
            os.write(self._file, data)
            self._written += len(data)

    def close(self) -> None:
        """Close the file; keep the bytes in memory."""
        os.close(self._file)


class Reader:
    """A reader that copies data from a descriptor to a `Tail` until end of file or `close()`.

    The reader runs on the event loop. It owns the descriptor, and makes it non-blocking.

    Attributes:
        ended: Done when the reader has stopped.
    """

    def __init__(self, fd: int, tail: Tail) -> None:
        os.set_blocking(fd, False)
        self._fd = private(fd)
        self._tail = tail
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(fd, self._read)

    def drain(self) -> None:
        """Read the available bytes, but at most 1 MiB: the writer may never stop."""
        for _ in range(16):
            if self._fd < 0 or not self._read():
                break

    def close(self) -> None:
        """Read the available bytes, then stop reading."""
        self.drain()
        self._stop()

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data:
            self._tail.feed(data)
        else:
            self._stop()
        return bool(data)

    def _stop(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(RuntimeError):
                self.ended.set_result(None)
