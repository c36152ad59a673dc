"""So many at a time, of all that one event loop does."""

from __future__ import annotations

import asyncio
import weakref

import anyio


class Slots:
    """A semaphore for each event loop.

    It is anyio's: one of asyncio's that was waited for holds its loop, which would never go.

    Args:
        count: How many may have it at a time.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._of: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, anyio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    def of_this_loop(self) -> anyio.Semaphore:
        """The running loop's."""
        return self._of.setdefault(asyncio.get_running_loop(), anyio.Semaphore(self._count))
