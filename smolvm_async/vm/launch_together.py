"""Hold the guests of VMs that launch at the same time until all these VMs are launched.

A booting guest uses a whole processor, and so slows down the launches of other VMs: 32 small VMs
on two processors took three times as long.
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
    """The launch of one VM, among all launches of its event loop."""

    def __init__(self) -> None:
        self._under_way = _launches.setdefault(asyncio.get_running_loop(), set())
        self._over = asyncio.Event()
        self._began = 0.0

    def begin(self) -> None:
        """Note that the launch has begun. Further calls do nothing."""
        if self not in self._under_way:
            self._began = time.monotonic()
            self._under_way.add(self)

    def end(self) -> None:
        """Note that the VM is launched, or that its launch failed."""
        self._under_way.discard(self)
        self._over.set()

    async def end_with_others(self) -> None:
        """End this launch, and wait for the other launches to end.

        Wait for each launch at most as long as this launch took: a launch that hangs may belong to
        an unrelated caller, and must not delay this VM any longer.
        """
        self.end()
        took = time.monotonic() - self._began
        for other in list(self._under_way):
            with suppress(TimeoutError):
                async with asyncio.timeout(took):
                    await other._over.wait()
