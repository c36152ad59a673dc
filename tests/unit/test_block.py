"""Leaving an `async with` block: the exception that comes out, and whose the cancellation is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import pytest

from smolvm_async.vm.block import Block

pytestmark = pytest.mark.anyio


class CrashError(Exception):
    """The failure of a VM."""


class Guarded:
    """Something that fails like a VM, and the block around it."""

    def __init__(self) -> None:
        self.block = Block()
        self.failure: Exception | None = None
        self.ended = False

    def fail(self, failure: Exception) -> None:
        self.failure = failure
        self.block.cancel()

    @asynccontextmanager
    async def inside(self, end: Awaitable[None] | None = None) -> AsyncIterator[None]:
        self.block.enter()
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
        await self.block.leave(end or self._end(), error, lambda: self.failure)
        if error is not None:
            raise error

    async def _end(self) -> None:
        self.ended = True


def cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_a_failure_cancels_the_body_and_comes_out() -> None:
    guarded = Guarded()
    with pytest.raises(CrashError, match="VM 1") as caught:
        async with guarded.inside():
            asyncio.get_running_loop().call_soon(guarded.fail, CrashError("VM 1"))
            await asyncio.sleep(1000)
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert guarded.ended
    assert not cancelling()


async def test_a_failure_replaces_the_bodys_exception_and_names_it_as_the_cause() -> None:
    guarded = Guarded()
    with pytest.raises(CrashError) as caught:
        async with guarded.inside():
            guarded.failure = CrashError()
            raise KeyError
    assert isinstance(caught.value.__cause__, KeyError)


async def test_a_failure_that_the_body_raises_itself_comes_out_as_it_is() -> None:
    guarded = Guarded()
    with pytest.raises(CrashError) as caught:
        async with guarded.inside():
            guarded.fail(CrashError())
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                assert guarded.failure is not None
                raise guarded.failure from None
    assert caught.value is guarded.failure
    assert not cancelling()


async def test_a_failure_does_not_replace_a_keyboard_interrupt() -> None:
    guarded = Guarded()
    with pytest.raises(KeyboardInterrupt):
        async with guarded.inside():
            guarded.failure = CrashError()
            raise KeyboardInterrupt


async def test_the_bodys_exception_comes_out_without_a_failure() -> None:
    with pytest.raises(KeyError):
        async with Guarded().inside():
            raise KeyError


@pytest.mark.parametrize("fails", [False, True])
async def test_a_foreign_cancellation_goes_on_its_way(fails: bool) -> None:
    guarded = Guarded()
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(1000) as timeout, guarded.inside():
            if fails:
                guarded.fail(CrashError("VM 1"))
            timeout.reschedule(0)
            await asyncio.sleep(0.01)
            await asyncio.sleep(1000)
    assert guarded.ended
    cause = caught.value.__cause__
    assert cause is not None
    assert getattr(cause, "__notes__", []) == (["VM 1"] if fails else [])
    assert not cancelling()


async def test_a_cancellation_that_comes_while_the_vms_end_goes_on_its_way() -> None:
    async def use() -> None:
        async with Guarded().inside(asyncio.sleep(1000)):
            raise KeyError

    using = asyncio.ensure_future(use())
    await asyncio.sleep(0)
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using


async def test_a_failure_that_the_body_has_not_noticed_comes_out() -> None:
    guarded = Guarded()
    with pytest.raises(CrashError):
        async with guarded.inside(asyncio.sleep(0)):
            guarded.fail(CrashError())
    assert not cancelling()


@pytest.mark.parametrize("several", [False, True])
async def test_two_blocks_that_fail_at_once_are_both_told_of(several: bool) -> None:
    def failure(name: str) -> Exception:
        return (
            ExceptionGroup("VMs failed", [CrashError(name), CrashError("x")])
            if several
            else CrashError(name)
        )

    outer, inner = Guarded(), Guarded()
    with pytest.raises((CrashError, ExceptionGroup)) as caught:
        async with outer.inside(), inner.inside():
            outer.fail(failure("outer"))
            inner.fail(failure("inner"))
            await asyncio.sleep(1000)
    assert caught.value is outer.failure
    cause = caught.value.__cause__
    assert isinstance(cause, asyncio.CancelledError)
    assert cause.__notes__ == (["inner", "x"] if several else ["inner"])
    assert not cancelling()


async def test_a_body_that_goes_on_after_one_failure_is_cancelled_by_the_next() -> None:
    guarded = Guarded()
    with pytest.raises(CrashError, match="second"):
        async with guarded.inside():
            for number in ("first", "second"):
                guarded.fail(CrashError(number))
                try:
                    await asyncio.sleep(1000)
                except asyncio.CancelledError:
                    assert guarded.block.cancelled
    assert not cancelling()


async def test_nothing_is_cancelled_outside_the_block() -> None:
    guarded = Guarded()
    guarded.block.cancel()
    async with guarded.inside():
        assert guarded.block.entered
    guarded.block.cancel()
    await asyncio.sleep(0)
    assert not cancelling()
