"""A file that is being downloaded: which bytes have arrived, and the journal that a resume reads.

Parts of the object arrive in parallel, so the file grows in several places at once. `Ranges` holds
what is there. The journal, a small JSON file beside the partial file, holds the same ranges, and
the object's ETag and size, for a later process.

The journal is written after the bytes that it lists. A process that is killed between the two
leaves a journal that lists too little, never too much, and the missing ranges are downloaded
again. After a crash of the host the journal may list bytes that the disk has lost; so the journal
is only a hint, and the digest of the whole file decides.
"""

from __future__ import annotations

import asyncio
import bisect
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from smolvm_async.foundation.files import replace_file
from smolvm_async.foundation.tasks import in_background

SAVE_INTERVAL = 0.5  # seconds between two journals


class Ranges:
    """Disjoint ranges of bytes, `(start, end)` without the end, in order."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        for start, end in ranges:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Add a range, and join it with the ranges that it overlaps or touches."""
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
        """Return how many bytes are there from the beginning, up to the first gap."""
        return self._ranges[0][1] if self._ranges and self._ranges[0][0] == 0 else 0

    @property
    def total(self) -> int:
        """Return how many bytes are there."""
        return sum(end - start for start, end in self._ranges)

    def gaps(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges that are missing of a file of `size` bytes."""
        at = 0
        for start, end in self._ranges:
            if at < start:
                yield at, start
            at = end
        if at < size:
            yield at, size

    def to_list(self) -> list[tuple[int, int]]:
        """Return the ranges as a list, for JSON."""
        return list(self._ranges)


class PartialFile:
    """A file that is being downloaded.

    Attributes:
        path: The file; its journal is beside it.
        size: Bytes of the complete file; 0 until that is known.
        etag: The object's ETag when the download began.
        resumed: Whether an earlier process downloaded some of it.

    Args:
        on_bytes: Called with the bytes that are there and the size, after each change.
    """

    def __init__(self, path: Path, on_bytes: Callable[[int, int], None]) -> None:
        self.path = path
        self.journal = path.with_suffix(".json")
        self.size = 0
        self.etag = ""
        self.resumed = False
        self._ranges = Ranges()
        self._on_bytes = on_bytes
        self._grown = asyncio.Event()

    async def begin(self, size: int, etag: str) -> None:
        """Create the file, or resume the one of an earlier process if the object is the same."""
        self.size, self.etag = size, etag
        old_etag, ranges = await in_background(read_journal, self.journal, size)
        existed = await in_background(_create, self.path, size)
        self.resumed = existed and old_etag == etag and ranges.total > 0
        self._ranges = ranges if self.resumed else Ranges()
        self._notify()

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Return the ranges of bytes that have not arrived."""
        return list(self._ranges.gaps(self.size))

    def add(self, start: int, end: int) -> None:
        """Note that these bytes are in the file."""
        self._ranges.add(start, end)
        self._notify()

    def _notify(self) -> None:
        self._grown.set()
        self._on_bytes(self._ranges.total, self.size)

    async def wait_beyond(self, at: int) -> int:
        """Wait until more than the first `at` bytes are there without a gap; return how many."""
        while self._ranges.prefix <= at:
            self._grown.clear()
            await self._grown.wait()
        return self._ranges.prefix

    async def save(self) -> None:
        """Write the journal."""
        ranges = Ranges(self._ranges.to_list())
        await in_background(write_journal, self.journal, self.etag, self.size, ranges)

    async def keep_saving(self) -> None:
        """Write the journal every half second, until cancelled."""
        while True:
            await asyncio.sleep(SAVE_INTERVAL)
            await self.save()


def _create(path: Path, size: int) -> bool:
    """Create the file, sparse and of its full size, unless it exists; return whether it did."""
    if path.is_symlink():
        path.unlink()
    exists = path.exists() and path.stat().st_size == size
    with path.open("r+b" if exists else "wb") as file:
        file.truncate(size)
    path.chmod(0o600)
    return exists


def write_journal(path: Path, etag: str, size: int, ranges: Ranges) -> None:
    """Replace the journal atomically."""
    content = json.dumps({"etag": etag, "size": size, "ranges": ranges.to_list()})
    replace_file(path, content.encode(), temporary=path.with_suffix(".new"))


def read_journal(path: Path, size: int) -> tuple[str, Ranges]:
    """Return the ETag and the ranges; both empty if there is no journal of a file of that size."""
    try:
        values: Any = json.loads(path.read_bytes())
        ranges = [(int(start), int(end)) for start, end in values["ranges"]]
        fits = all(0 <= start < end <= size for start, end in ranges)
        if values["size"] == size and isinstance(values["etag"], str) and fits:
            return values["etag"], Ranges(ranges)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        pass
    return "", Ranges()
