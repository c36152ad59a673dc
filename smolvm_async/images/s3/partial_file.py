"""What of an object has arrived, while it does: told to the journal, to the reader, to people."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.s3.journal import Ranges, read_journal, write_journal

SAVE = 0.5  # seconds between two journals


class Arrival:
    """A file that grows in several places at once.

    Attributes:
        path: Where it is; its journal is beside it.
        size: Bytes that it will have; 0 until that is known.
        etag: Of the object, as the server had it first.
        resumed: Whether an earlier process began it.
    """

    def __init__(self, path: Path, on_bytes: Callable[[int, int], None]) -> None:
        self.path = path
        self.journal = path.with_suffix(".json")
        self.size = 0
        self.etag = ""
        self.resumed = False
        self._ranges = Ranges()
        self._on_bytes = on_bytes
        self._news = asyncio.Event()

    async def begin(self, size: int, etag: str) -> None:
        """Take up what an earlier process has left, if it was the same object.

        Raises:
            OSError: If the file cannot be made.
        """
        self.size, self.etag = size, etag
        old, ranges = await in_background(read_journal, self.journal, size)
        there = await in_background(_make, self.path, size)
        self.resumed = there and old == etag and ranges.total > 0
        self._ranges = ranges if self.resumed else Ranges()
        self._tell()

    @property
    def missing(self) -> list[tuple[int, int]]:
        """The ranges of bytes that have yet to come."""
        return list(self._ranges.gaps(self.size))

    def add(self, start: int, end: int) -> None:
        """These bytes are in the file."""
        self._ranges.add(start, end)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._on_bytes(self._ranges.total, self.size)

    async def beyond(self, at: int) -> int:
        """Until more than the first `at` bytes are there, without a gap; how many then are."""
        while self._ranges.prefix <= at:
            self._news.clear()
            await self._news.wait()
        return self._ranges.prefix

    async def save(self) -> None:
        """Write the journal.

        Raises:
            OSError: If the disk is full.
        """
        ranges = Ranges(self._ranges.to_list())
        await in_background(write_journal, self.journal, self.etag, self.size, ranges)

    async def keep_saving(self) -> None:
        """Write it now and then, until cancelled."""
        while True:
            await asyncio.sleep(SAVE)
            await self.save()


def _make(path: Path, size: int) -> bool:
    """Make the file, whole and empty of blocks, unless there is one; whether there was."""
    if path.is_symlink():
        path.unlink()
    there = path.exists() and path.stat().st_size == size
    with path.open("r+b" if there else "wb") as file:
        file.truncate(size)
    path.chmod(0o600)
    return there
