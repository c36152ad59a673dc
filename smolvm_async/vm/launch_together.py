"""VMs that are launched side by side: none of their guests runs before all of them are launched.

A guest that boots takes all of a processor. What is launched meanwhile would have to share: 32
small VMs on two processors took three times as long.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from contextlib import suppress

_launches: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[Launch]] = (
    weakref.WeakKeyDictionary()
)


class Launch:
    """The launch of one VM, among the others of its event loop.

    Args:
        under_way: Whether it has begun.
    """

    def __init__(self, *, under_way: bool = False) -> None:
        self._under_way = _launches.setdefault(asyncio.get_running_loop(), set())
        self._over = asyncio.Event()
        self._began = 0.0
        if under_way:
            self.begin()

    def begin(self) -> None:
        """From now on it is under way, if it is not already."""
        if self not in self._under_way:
            self._began = time.monotonic()
            self._under_way.add(self)

    def end(self) -> None:
        """The VM is launched, or never will be."""
        self._under_way.discard(self)
        self._over.set()

    async def end_with_others(self) -> None:
        """End, and wait for those that are under way.

        For each as long as this one took at most: one that hangs, and may be another user's,
        must do no harm.
        """
        self.end()
        took = time.monotonic() - self._began
        for other in list(self._under_way):
            with suppress(TimeoutError):
                async with asyncio.timeout(took):
                    await other._over.wait()
