"""So many at a time, of all that one event loop does."""

from __future__ import annotations

import asyncio
import weakref


class Slots:
    """A semaphore for each event loop.

    Args:
        count: How many may have it at a time.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._of: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    def of_this_loop(self) -> asyncio.Semaphore:
        """The running loop's."""
        return self._of.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._count))
