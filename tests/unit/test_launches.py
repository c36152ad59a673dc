"""Launches that are under way together end together, but do not wait for a hanging one."""

from __future__ import annotations

import asyncio

import pytest

from smolvm_async.vm.launch_together import Launch

pytestmark = pytest.mark.anyio


async def under_way(seconds: float = 60) -> Launch:
    """Return a launch that began so many seconds ago."""
    launch = Launch()
    launch.begin()
    launch._began -= seconds
    return launch


async def test_guests_run_once_all_that_were_under_way_are_launched() -> None:
    first, second, third = [await under_way() for _ in range(3)]
    ends = [asyncio.ensure_future(launch.end_with_others()) for launch in (first, second)]
    done, _ = await asyncio.wait(ends, timeout=0.05)
    assert not done
    later = await under_way()  # a launch that begins now is not waited for
    third.end()
    await asyncio.gather(*ends)
    later.end()


async def test_a_launch_that_hangs_delays_the_others_by_no_more_than_they_took() -> None:
    hanging, quick = await under_way(), await under_way(0)
    await quick.end_with_others()
    hanging.end()


async def test_a_launch_may_begin_and_end_twice() -> None:
    launch = await under_way()
    launch.begin()
    await launch.end_with_others()
    launch.end()
    other = await under_way()
    await other.end_with_others()  # it is the only one


async def test_a_cancelled_launch_is_not_waited_for() -> None:
    first, second = await under_way(), await under_way()
    waiting = asyncio.ensure_future(first.end_with_others())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await second.end_with_others()
