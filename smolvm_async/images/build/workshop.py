"""Where an image is made: a directory for the one build that is going on, and who is told of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from smolvm_async.foundation.progress import Progress, ProgressCallback, report
from smolvm_async.foundation.tasks import in_background


@asynccontextmanager
async def workshop(store: Path) -> AsyncIterator[Path]:
    """A directory in `store`, which the caller has locked, for as long as the block lasts."""
    work = store / "building"
    if work.exists():  # its builder was killed, or we would not hold the lock
        await in_background(shutil.rmtree, work)
    work.mkdir()
    try:
        yield work
    finally:
        await in_background(shutil.rmtree, work)


class Steps:
    """Reports the steps of a build, with the seconds since it began."""

    def __init__(self, callback: ProgressCallback | None, total: int) -> None:
        self._callback = callback
        self._total = total
        self._started = time.monotonic()

    def report(self, done: int, message: str) -> None:
        """So many steps are done, and this one begins."""
        self.relay(Progress("image", message, 0.0, done, self._total))

    def relay(self, progress: Progress) -> None:
        """Hand on what a part of a step reports, as of the whole build."""
        elapsed = time.monotonic() - self._started
        report(self._callback, replace(progress, elapsed=elapsed))


def key_of(*parts: object) -> str:
    """A name that changes with what it is made of."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
