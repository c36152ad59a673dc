"""One semaphore for each event loop, which does not keep the loop."""

from __future__ import annotations

import asyncio
import gc
import weakref

from smolvm_async.foundation.slots import Slots


async def use(slots: Slots) -> int:
    """The most that have had it at once."""
    busy = most = 0

    async def one() -> None:
        nonlocal busy, most
        async with slots.of_this_loop():
            busy += 1
            most = max(most, busy)
            await asyncio.sleep(0)
            busy -= 1

    await asyncio.gather(*(one() for _ in range(9)))
    return most


def test_so_many_at_a_time_in_each_loop_and_a_loop_that_is_over_goes() -> None:
    slots = Slots(2)
    loops = []
    for _ in range(3):
        with asyncio.Runner() as runner:
            assert runner.run(use(slots)) == 2
            loops.append(weakref.ref(runner.get_loop()))
        del runner
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3
