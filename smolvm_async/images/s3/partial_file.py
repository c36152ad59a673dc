"""What of an object has arrived, while it does: told to the journal, to the reader, to people."""

from __future__ import annotations

import asyncio
import bisect
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from smolvm_async.foundation.tasks import in_background

SAVE = 0.5  # seconds between two journals


class Ranges:
    """Disjoint ranges of bytes, `(start, end)` without the end, in order."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        for start, end in ranges:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Add a range, and join it to its neighbours."""
        at = bisect.bisect_left(self._ranges, (start, start))
        if at and self._ranges[at - 1][1] >= start:
            at -= 1
            start = self._ranges[at][0]
        last = at
        while last < len(self._ranges) and self._ranges[last][0] <= end:
            end = max(end, self._ranges[last][1])
            last += 1
        self._ranges[at:last] = [(start, end)]

    @property
    def prefix(self) -> int:
        """How many bytes are there from the beginning on, without a gap."""
        return self._ranges[0][1] if self._ranges and self._ranges[0][0] == 0 else 0

    @property
    def total(self) -> int:
        """How many bytes are there."""
        return sum(end - start for start, end in self._ranges)

    def gaps(self, size: int) -> Iterator[tuple[int, int]]:
        """What is missing of a file of so many bytes."""
        at = 0
        for start, end in self._ranges:
            if at < start:
                yield at, start
            at = end
        if at < size:
            yield at, size

    def to_list(self) -> list[tuple[int, int]]:
        """As JSON holds them."""
        return list(self._ranges)


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


# The journal: written after the bytes that it tells of, so that whoever is killed leaves one that
# promises too little, never too much. It is a hint all the same, since the digest decides.


def write_journal(path: Path, etag: str, size: int, ranges: Ranges) -> None:
    """Replace the journal, at once and as a whole.

    Raises:
        OSError: If the disk is full.
    """
    new = path.with_suffix(".new")
    try:
        new.write_text(json.dumps({"etag": etag, "size": size, "ranges": ranges.to_list()}))
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def read_journal(path: Path, size: int) -> tuple[str, Ranges]:
    """The ETag and what has arrived; nothing, if there is no journal of a file of that size."""
    try:
        values: Any = json.loads(path.read_bytes())
        ranges = [(int(start), int(end)) for start, end in values["ranges"]]
        fits = all(0 <= start < end <= size for start, end in ranges)
        if values["size"] == size and isinstance(values["etag"], str) and fits:
            return values["etag"], Ranges(ranges)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        pass
    return "", Ranges()
