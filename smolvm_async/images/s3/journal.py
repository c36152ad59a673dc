"""What of a file has arrived, as ranges of bytes, and the journal that a later process reads.

The journal is written after the bytes that it tells of: whoever is killed leaves one that promises
too little, never too much. It is a hint all the same, since the digest decides.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


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
