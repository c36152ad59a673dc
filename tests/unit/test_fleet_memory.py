"""The promises of memory: nothing is promised twice, and every VM has its turn."""

from __future__ import annotations

import asyncio

import pytest

from smolvm_async import HostError
from smolvm_async.fleet.memory import HEADROOM, MemoryPromises
from smolvm_async.host.memory import Memory

pytestmark = pytest.mark.anyio

TOTAL = 10_000
KEPT = int(TOTAL * HEADROOM)


class Host:
    """A host whose memory the test uses up."""

    def __init__(self, available: int) -> None:
        self.available = available + KEPT

    def look(self) -> Memory:
        return Memory(TOTAL, self.available)


async def test_what_is_promised_and_not_touched_is_reserved() -> None:
    host = Host(1000)
    promises = MemoryPromises(host.look)
    async with promises.promised(600) as promise:
        assert promises.room() == 400
        host.available -= 500
        promise.used = lambda: 500
        assert promises.room() == 400
        promise.used = lambda: 700  # more than it was promised: the host shows it already
        assert promises.room() == 500
        assert promises.capacity() == 1100
    assert promises.room() == 500


async def test_no_vm_overtakes_an_earlier_one() -> None:
    promises = MemoryPromises(Host(1000).look)
    order: list[int] = []
    over = asyncio.Event()

    async def claim(size: int) -> None:
        async with promises.promised(size):
            order.append(size)
            await over.wait()

    first = asyncio.ensure_future(claim(700))
    while not order:
        await asyncio.sleep(0)
    claims = [asyncio.ensure_future(claim(size)) for size in (500, 100, 200)]
    for _ in range(50):
        await asyncio.sleep(0)
    assert order == [700]  # 100 and 200 would fit
    over.set()
    await asyncio.gather(first, *claims)
    assert order[0] == 700
    assert sorted(order[1:]) == [100, 200, 500]  # there was room for all three
    assert promises.room() == 1000


async def test_many_are_promised_memory_without_a_look_at_the_host_for_each() -> None:
    looks = 0
    host = Host(1000)

    def look() -> Memory:
        nonlocal looks
        looks += 1
        return host.look()

    promises = MemoryPromises(look)
    promised = asyncio.Semaphore(0)
    over = asyncio.Event()

    async def claim() -> None:
        async with promises.promised(100):
            promised.release()
            await over.wait()

    claims = [asyncio.ensure_future(claim()) for _ in range(12)]
    for _ in range(10):
        await promised.acquire()
    assert looks < 10
    over.set()
    await asyncio.gather(*claims)
    assert promises.room() == 1000


async def test_a_cancelled_vm_leaves_the_queue() -> None:
    promises = MemoryPromises(Host(1000).look)
    async with promises.promised(700):
        waiting = asyncio.ensure_future(promises.promised(400).__aenter__())
        after = asyncio.ensure_future(promises.promised(300).__aenter__())
        for _ in range(50):
            await asyncio.sleep(0)
        assert not after.done()
        waiting.cancel()
        await after
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert promises.room() == 0


async def test_what_never_fits_is_refused_and_what_will_fit_waits() -> None:
    host = Host(1000)
    promises = MemoryPromises(host.look)
    with pytest.raises(HostError, match=r"1001 MiB.* 1000 MiB can be promised"):
        await promises.promised(1001).__aenter__()
    async with promises.promised(500):
        waiting = asyncio.ensure_future(promises.promised(900).__aenter__())
        for _ in range(50):
            await asyncio.sleep(0)
        host.available += 400  # freed by another program
    await waiting


async def test_event_loops_of_several_threads_share_it() -> None:
    promises = MemoryPromises(Host(1000).look)
    peaks: list[int] = []
    inside = 0

    async def claim() -> None:
        nonlocal inside
        async with promises.promised(400):
            inside += 1
            peaks.append(inside)
            await asyncio.sleep(0)
            inside -= 1

    async def many() -> None:
        await asyncio.gather(*(claim() for _ in range(20)))

    await asyncio.gather(*(asyncio.to_thread(asyncio.run, many()) for _ in range(3)))
    assert max(peaks) <= 2
    assert len(peaks) == 60
    assert promises.room() == 1000


async def test_what_can_never_fit_is_refused_and_holds_up_nobody() -> None:
    promises = MemoryPromises(Host(1000).look)
    async with promises.promised(600):
        with pytest.raises(HostError, match="1000 MiB can be promised"):
            async with promises.promised(1001):
                raise AssertionError("it was promised")
        async with promises.promised(400):
            assert promises.room() == 0


async def test_the_first_in_the_queue_goes_on_first() -> None:
    promises = MemoryPromises(Host(1000).look)
    order: list[int] = []

    async def claim(number: int) -> None:
        async with promises.promised(100):
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(claim(number) for number in range(8)))
    assert order == [*range(8)]
