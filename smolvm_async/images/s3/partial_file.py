"""A file that is being downloaded, the bytes that have arrived, and a journal to resume from.

Parts of the object arrive in parallel, so the file grows in several places at once. `Ranges` holds
the ranges that have arrived. The journal, a small JSON file beside the partial file, holds the same
ranges, and the object's ETag and size, for a later process.

The journal is written after the bytes that it lists. If a process is killed in between, its journal
lists too few bytes, never too many, and the ranges that it lacks are downloaded again. If the host
crashes, the journal may list bytes that the disk has lost. So the journal is only a hint; the
digest of the whole file decides.
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
    """Sorted, disjoint ranges of bytes, `(start, end)`; the end is exclusive."""

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
        """Return the number of bytes from the beginning of the file to the first gap."""
        return self._ranges[0][1] if self._ranges and self._ranges[0][0] == 0 else 0

    @property
    def total(self) -> int:
        """Return the number of bytes in all ranges."""
        return sum(end - start for start, end in self._ranges)

    def gaps(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield the missing ranges of a file of `size` bytes."""
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
        size: Bytes of the complete file; 0 until the size is known.
        etag: The object's ETag when the download began.
        resumed: Whether an earlier process downloaded a part of the file.

    Args:
        on_bytes: Called after each change, with the number of bytes that have arrived and the size.
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
        """Create the file, or resume an earlier process's file if the object is still the same."""
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
        """Note that the bytes from `start` to `end` are in the file."""
        self._ranges.add(start, end)
        self._notify()

    def _notify(self) -> None:
        self._grown.set()
        self._on_bytes(self._ranges.total, self.size)

    async def wait_beyond(self, at: int) -> int:
        """Wait until more than `at` bytes have arrived without a gap; return their number."""
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
    """Create a sparse file of the full size, unless the file exists; return whether it existed."""
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
    """Return a journal's ETag and ranges; both are empty if no journal for this size exists."""
    try:
        values: Any = json.loads(path.read_bytes())
        ranges = [(int(start), int(end)) for start, end in values["ranges"]]
        fits = all(0 <= start < end <= size for start, end in ranges)
        if values["size"] == size and isinstance(values["etag"], str) and fits:
            return values["etag"], Ranges(ranges)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        pass
    return "", Ranges()
