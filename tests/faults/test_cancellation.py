"""Cancellation at any moment, once or twice: nothing is left, and CancelledError comes out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from smolvm_async import AsyncSmolVM, Rung, Status, VMNotRunningError
from tests.conftest import children

pytestmark = pytest.mark.anyio

MOMENTS = 10  # the test of every await covers all of them


@pytest.fixture
def new_vm(blank_image: Path, data_dir: Path) -> Callable[[], AsyncSmolVM]:
    return lambda: AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg")


async def cancelled_after(work: Awaitable[object], delay: float, *, again: float | None) -> bool:
    """Cancel `work` after `delay` seconds, and again; return whether it raised `CancelledError`."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(delay)
    task.cancel()
    if again is not None:
        await asyncio.sleep(again)
        task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


@pytest.mark.parametrize("twice", [False, True])
async def test_start_cancelled_at_ten_moments(
    new_vm: Callable[[], AsyncSmolVM], data_dir: Path, twice: bool
) -> None:
    async def boot() -> None:
        async with new_vm():
            await asyncio.sleep(60)

    began = time.monotonic()
    async with new_vm():
        launch = time.monotonic() - began
    for moment in range(MOMENTS):
        delay = 1.2 * launch * moment / MOMENTS
        again = (moment % 5) * 0.002 if twice else None
        assert await cancelled_after(boot(), delay, again=again)
        assert not children()
        assert not data_dir.exists() or not list(data_dir.iterdir())


async def test_body_cancelled_by_an_anyio_scope(
    new_vm: Callable[[], AsyncSmolVM], data_dir: Path
) -> None:
    with anyio.move_on_after(0.3) as scope:
        async with new_vm() as vm:
            await anyio.sleep(60)
    assert scope.cancelled_caught
    assert vm.status is Status.DELETED
    assert not children()
    assert not list(data_dir.iterdir())


async def test_start_cancelled_by_an_anyio_scope(
    new_vm: Callable[[], AsyncSmolVM], data_dir: Path
) -> None:
    for delay in (0.0, 0.005, 0.02, 0.035):
        with anyio.move_on_after(delay) as scope:
            async with new_vm():
                await anyio.sleep(60)
        assert scope.cancelled_caught
        assert not children()


@pytest.mark.parametrize("again", [None, 0.0, 0.003, 0.01])
async def test_stop_cancelled_kills_at_once(
    new_vm: Callable[[], AsyncSmolVM], again: float | None, data_dir: Path
) -> None:
    vm = new_vm()
    await vm.start()
    assert await cancelled_after(vm.stop(), 0.0005, again=again)
    assert not children()
    assert vm.status is Status.STOPPED
    await vm.delete()


async def test_a_second_starter_is_not_harmed_by_the_first_ones_cancellation(
    new_vm: Callable[[], AsyncSmolVM],
) -> None:
    vm = new_vm()
    first, second = asyncio.ensure_future(vm.start()), asyncio.ensure_future(vm.start())
    await asyncio.sleep(0.01)
    first.cancel()
    await second
    assert vm.status is Status.RUNNING
    assert len(children()) == 2  # two starts, one VM
    await vm.delete()


async def test_stopped_while_it_starts_and_started_while_it_stops(
    new_vm: Callable[[], AsyncSmolVM],
) -> None:
    vm = new_vm()
    starting = asyncio.ensure_future(vm.start())
    await asyncio.sleep(0)
    await vm.stop(timeout=0)
    with pytest.raises(VMNotRunningError, match="stopped while it started"):
        await starting
    await vm.start()
    stopping = asyncio.ensure_future(vm.stop())
    await asyncio.sleep(0)
    await vm.start()  # afresh, once it has stopped
    assert (await stopping).rung is Rung.QUIT
    assert vm.status is Status.RUNNING
    await vm.delete()


async def test_deleted_while_it_starts(new_vm: Callable[[], AsyncSmolVM]) -> None:
    vm = new_vm()
    starting = asyncio.ensure_future(vm.start())
    await asyncio.sleep(0.01)
    await vm.delete()
    with pytest.raises(VMNotRunningError):
        await starting


async def test_an_exception_in_the_body_kills_and_comes_out(
    new_vm: Callable[[], AsyncSmolVM],
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with new_vm() as vm:
            raise ZeroDivisionError
    assert (await vm.stop()).rung is Rung.SIGKILL


def test_a_loop_that_ends_takes_its_forgotten_vms_with_it(
    new_vm: Callable[[], AsyncSmolVM], data_dir: Path
) -> None:
    async def forget() -> None:
        await new_vm().start()
        await new_vm().start()

    asyncio.run(forget())
    assert not children()
    assert not list(data_dir.iterdir())
