"""Work that outlasts the cancellation of its caller, threads, and a semaphore for each loop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import selectors
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest

from smolvm_async.foundation.tasks import (
    Slots,
    in_background,
    in_thread,
    no_collection,
    settle,
    submit,
)

pytestmark = pytest.mark.anyio

InThread = Callable[..., Coroutine[Any, Any, Any]]
either = pytest.mark.parametrize("run", [in_thread, in_background])
number = contextvars.ContextVar[int]("number")


async def turns(count: int) -> None:
    """Give everything else the loop, so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_the_work_returns_or_raises_passes_through() -> None:
    async def work(error: Exception | None) -> int:
        await turns(2)
        if error is not None:
            raise error
        return 7

    failure = ValueError("the work's own")
    assert await settle(work(None)) == 7
    with pytest.raises(ValueError, match="own") as caught:
        await settle(work(failure))
    assert caught.value is failure
    done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    done.set_result("at once")
    assert await settle(done) == "at once"


@pytest.mark.parametrize("outcome", ["result", "error"])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancelled_waiter_stays_until_the_work_has_ended(times: int, outcome: str) -> None:
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    release, log = asyncio.Event(), []

    async def work() -> None:
        try:
            await release.wait()
            await turns(3)
            log.append("work done")
            if outcome == "error":
                raise ValueError("nobody sees this one")
        except asyncio.CancelledError:
            log.append("work cancelled")
            raise

    async def wait() -> None:
        try:
            await settle(work())
        finally:
            log.append("waiter left")

    waiter = asyncio.create_task(wait())
    await turns(2)
    for _ in range(times):
        waiter.cancel()
        await turns(3)
        assert not waiter.done()
    release.set()
    await asyncio.wait([waiter])
    assert log == ["work done", "waiter left"]
    assert waiter.cancelled()
    assert waiter.cancelling() == times
    del waiter
    gc.collect()
    assert not complaints, "asyncio complained of an exception that nobody retrieved"
    loop.set_exception_handler(None)


async def test_work_that_was_itself_cancelled_says_so_to_its_waiter() -> None:
    task = asyncio.create_task(asyncio.sleep(3600))
    waiter = asyncio.create_task(settle(task))
    await turns(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert waiter.cancelling() == 0


async def test_a_native_deadline_is_late_but_is_still_that_deadline() -> None:
    done: list[bool] = []

    async def work() -> None:
        await turns(20)
        done.append(True)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await settle(work())
    assert done


async def test_a_cancelled_anyio_scope_waits_for_the_work_and_is_then_left() -> None:
    done: list[bool] = []

    async def work() -> None:
        await turns(20)
        done.append(True)

    with anyio.CancelScope() as scope:
        scope.cancel()
        await settle(work())
        assert done
        await turns(1)  # the first await outside is where the scope takes effect
        pytest.fail("the cancellation was lost")
    assert scope.cancelled_caught


# Threads


@either
async def test_a_thread_runs_to_its_end_though_its_waiter_was_cancelled(run: InThread) -> None:
    began, release = threading.Event(), threading.Event()
    log: list[tuple[str, int]] = []

    def work(name: str, number: int) -> None:
        began.set()
        release.wait(10)
        log.append((name, number))

    waiter = asyncio.create_task(run(work, "thread", 1))
    while not began.is_set():
        await turns(1)
    for _ in range(3):
        waiter.cancel()
        await turns(3)
    assert not waiter.done()
    assert not log
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert log == [("thread", 1)]


@either
async def test_a_thread_returns_and_raises_like_a_call(run: InThread) -> None:
    loop_thread = threading.get_ident()
    assert await run(threading.get_ident) != loop_thread
    with pytest.raises(ZeroDivisionError):
        await run(divmod, 1, 0)


@either
async def test_a_thread_sees_the_context_variables_of_its_caller(run: InThread) -> None:
    async def told(value: int) -> int:
        number.set(value)
        return int(await run(number.get))

    assert [*await asyncio.gather(told(1), told(2))] == [1, 2]
    assert number.get(None) is None


@either
def test_a_thread_outlives_even_the_end_of_asyncio_run(run: InThread) -> None:
    """At its end `asyncio.run` cancels every task that is left."""
    began, release = threading.Event(), threading.Event()
    log: list[str] = []

    def work() -> None:
        began.set()
        release.wait(10)
        log.append("work done")

    async def waiter() -> None:
        try:
            await run(work)
        finally:
            log.append("waiter left")

    async def main() -> None:
        leftover = asyncio.create_task(waiter())
        while not began.is_set():
            await turns(1)
        asyncio.get_running_loop().call_later(0.05, release.set)  # after main() has returned
        log.append("main left")
        assert not leftover.done()

    asyncio.run(main())
    assert log == ["main left", "work done", "waiter left"]


async def test_what_is_submitted_runs_in_order_in_one_thread_though_nobody_waits() -> None:
    log: list[tuple[int, threading.Thread]] = []
    for turn in range(20):
        submit(lambda turn=turn: log.append((turn, threading.current_thread())))
    await in_thread(int)
    assert [turn for turn, _ in log] == list(range(20))
    (worker,) = {thread for _, thread in log}
    assert worker.name.startswith("smolvm-async")


async def test_work_in_the_background_holds_nothing_up() -> None:
    release = threading.Event()
    slow = asyncio.create_task(in_background(release.wait, 10))
    await turns(1)
    await in_thread(release.set)
    assert await slow


def test_every_loop_has_a_worker_of_its_own_which_ends_when_the_loop_is_collected() -> None:
    workers = [asyncio.run(in_thread(threading.current_thread)) for _ in range(2)]
    assert workers[0] is not workers[1]
    for worker in workers:
        while worker.is_alive():  # it may itself still hold what it did last for the loop
            gc.collect()
            worker.join(0.1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from 3.12 on
def test_a_forked_child_has_a_worker_too() -> None:
    with asyncio.Runner() as runner:
        runner.run(in_thread(int))
        child = os.fork()  # no thread but this one comes along
        if not child:
            try:
                os._exit(asyncio.run(in_thread(int, "7")))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# Waiting costs nothing


class CountingSelector(selectors.DefaultSelector):
    """Counts how often the event loop goes round."""

    rounds = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Go round once more."""
        self.rounds += 1
        return super().select(timeout)


async def under_a_cancelled_scope(work: asyncio.Future[None]) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await settle(work)


async def under_a_nested_cancelled_scope(work: asyncio.Future[None]) -> None:
    with anyio.CancelScope() as scope, anyio.CancelScope(), anyio.CancelScope():
        scope.cancel()
        await settle(work)


async def under_a_cancelled_task_group(work: asyncio.Future[None]) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(settle, work)
        await turns(2)
        group.cancel_scope.cancel()


async def after_native_cancellations(work: asyncio.Future[None]) -> None:
    waiter = asyncio.create_task(settle(work))
    for _ in range(3):
        await turns(2)
        waiter.cancel()
    await asyncio.wait([waiter])


@pytest.mark.parametrize(
    "wait",
    [
        under_a_cancelled_scope,
        under_a_nested_cancelled_scope,
        under_a_cancelled_task_group,
        after_native_cancellations,
    ],
)
def test_a_cancelled_wait_does_not_spin(
    wait: Callable[[asyncio.Future[None]], Coroutine[Any, Any, None]],
) -> None:
    selector = CountingSelector()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        work: asyncio.Future[None] = loop.create_future()
        loop.call_later(0.1, work.set_result, None)  # a spinning loop goes round 1000s of times
        await wait(work)
        assert work.done()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(main())
    assert selector.rounds < 50


def test_what_imports_very_much_is_not_interrupted_by_the_garbage_collector() -> None:
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        generations.append(info["generation"])

    gc.callbacks.append(note)
    try:
        with no_collection():
            many: list[list[object]] = [[] for _ in range(200_000)]
    finally:
        gc.callbacks.remove(note)
    assert not generations
    assert gc.isenabled()
    assert gc.is_tracked(many)
    assert any(many is thing for thing in gc.get_objects(generation=2))


def test_whoever_collects_or_freezes_by_himself_is_left_alone() -> None:
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.freeze()
    try:
        with no_collection():
            assert gc.isenabled()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


# Slots


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
