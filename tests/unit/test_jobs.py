"""`map()` on fake VMs: order, failures, retries, reuse, back pressure and cancellation."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from smolvm_async import ConfigError, FleetError, JobFailedError, MemberFailedError
from smolvm_async.fleet import jobs
from smolvm_async.fleet.dask.client import DaskMapCall, JobWindow
from smolvm_async.fleet.dask.messages import JobReply, JobRequest, dumps, loads, pack
from smolvm_async.fleet.dask.worker import _without_exit
from smolvm_async.fleet.jobs import (
    READ_AHEAD,
    LocalMapCall,
    MapCall,
    attempt_job,
    check_work,
)
from smolvm_async.qemu.events import BootState

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(10)]


class FakeVM:
    """A VM that is ready once it has a place, and gone as soon as it is to be deleted."""

    def __init__(self, source: FakeVMs, number: int) -> None:
        self.vm: Any = SimpleNamespace(vm_id=f"vm-{number}", fake=self)
        self.error: MemberFailedError | None = None
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Any] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self.runs = True
        self._source = source

    @property
    def others_wait(self) -> bool:
        return bool(self._source.queue)

    async def usable(self) -> bool:
        await asyncio.sleep(0)
        return self.runs and not self.over.done()

    async def delete(self) -> None:
        self.delete_soon()

    def delete_soon(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
            self._source.end(self)

    def crash(self) -> None:
        self.error = MemberFailedError("it crashed", self.vm.vm_id)
        self.error.__cause__ = EOFError("killed")
        self.delete_soon()


class FakeVMs:
    """A fleet of fake VMs, of which so many can run at once."""

    def __init__(self, places: int = 100) -> None:
        self.made: list[FakeVM] = []
        self.queue: deque[FakeVM] = deque()
        self.most = 0
        self.calls: list[MapCall[Any, Any]] = []
        self._free = places
        self._places = places

    def take(self) -> FakeVM:
        vm = FakeVM(self, len(self.made))
        self.made.append(vm)
        self.queue.append(vm)
        self._hand_out()
        return vm

    def end(self, vm: FakeVM) -> None:
        if vm in self.queue:
            self.queue.remove(vm)
        else:
            self._free += 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._free and self.queue:
            self._free -= 1
            self.most = max(self.most, self._places - self._free)
            vm = self.queue.popleft()
            vm.ready.set_result(vm.vm)

    def map(
        self,
        job: Any,
        items: Any,
        *,
        workers: int = 2,
        retries: int = 0,
        reuse: bool = False,
        in_order: bool = False,
        on_error: Any = "raise",
    ) -> AsyncIterator[Any]:
        check_work(job, items, reuse=reuse, in_order=in_order)
        take: Any = self.take
        call = LocalMapCall(lambda: None, take, job, items, retries, reuse)
        self.calls.append(call)
        return call.results(workers, in_order, on_error)


class FakeDask(FakeVMs):
    """The same on Dask workers, which are tasks here; all messages are really pickled."""

    def __init__(self, places: int = 100) -> None:
        super().__init__(places)
        self.window = JobWindow(100)
        self.need = 128
        self.client = self
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        return task

    def watch_task(self, key: str) -> asyncio.Future[str]:
        return asyncio.get_running_loop().create_future()

    async def everywhere(self, function: Any, *arguments: Any) -> None:
        await asyncio.sleep(0)

    def submit(self, perform: Any, request: JobRequest, **options: Any) -> FakeFuture:
        return FakeFuture(self.start(self._perform(request)))

    async def _perform(self, request: JobRequest) -> JobReply:
        vm = self.take()
        try:
            member: Any = vm
            value = await attempt_job(
                member, _without_exit(loads(request.job)), loads(request.item)
            )
            return JobReply(vm.vm.vm_id, dumps(value))
        except Exception as error:
            return JobReply(vm.vm.vm_id, errors=pack(error, "a worker"))
        finally:
            vm.delete_soon()

    def map(
        self,
        job: Any,
        items: Any,
        *,
        workers: int = 2,
        retries: int = 0,
        reuse: bool = False,
        in_order: bool = False,
        on_error: Any = "raise",
    ) -> AsyncIterator[Any]:
        self.window.resize(workers)
        dask: Any = self
        request = JobRequest("fleet", "call", b"", dumps(job), BootState.READY, rerun=True)
        call: DaskMapCall[Any, Any] = DaskMapCall(dask, request, items, retries)
        return call.results(1, in_order, on_error)


class FakeFuture:
    """The future of a task that was submitted to Dask."""

    def __init__(self, task: asyncio.Task[JobReply]) -> None:
        self._task = task

    @property
    def status(self) -> str:
        return "finished" if self._task.done() else "pending"

    def release(self) -> None:
        self._task.cancel()

    def __await__(self) -> Generator[Any, None, JobReply]:
        return self._task.__await__()


@pytest.fixture(params=[FakeVMs, FakeDask])
async def either(request: pytest.FixtureRequest) -> AsyncIterator[FakeVMs]:
    """Fake VMs of either kind of fleet; none is left. Jobs must not be closures."""
    source = request.param()
    yield source
    assert all(vm.over.done() for vm in source.made)


@pytest.fixture
async def vms() -> AsyncIterator[FakeVMs]:
    """Fake VMs of this process; none is left."""
    source = FakeVMs()
    yield source
    assert all(vm.over.done() for vm in source.made)


async def ident(vm: Any, item: Any) -> tuple[Any, str]:
    await asyncio.sleep(0)
    return item, vm.vm_id


async def fails_at_two(vm: Any, item: Any) -> Any:
    if item == 2:
        raise KeyError("two")
    return item


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def drain(results: AsyncIterator[Any]) -> list[Any]:
    return [result async for result in results]


async def drain_until(
    results: AsyncIterator[Any],
) -> tuple[list[Any], BaseExceptionGroup[Any] | Exception]:
    """Return the results, and the exception after them."""
    found = []
    with pytest.raises((ExceptionGroup, OSError)) as caught:
        async for result in results:
            found.append(result)  # noqa: PERF401 (those before the failure count)
    return found, caught.value


def failures(group: BaseException) -> list[JobFailedError]:
    assert isinstance(group, ExceptionGroup)
    return [error for error in group.exceptions if isinstance(error, JobFailedError)]


# Results and their order


@pytest.mark.parametrize("reuse", [False, True])
async def test_each_item_has_its_job_on_a_vm(vms: FakeVMs, reuse: bool) -> None:
    results = await drain(vms.map(ident, range(8), workers=3, reuse=reuse))
    assert sorted(item for item, _ in results) == list(range(8))
    assert len({vm_id for _, vm_id in results}) == len(vms.made) == (3 if reuse else 8)
    assert vms.most <= 3


async def test_results_come_in_order_if_that_is_wanted(either: FakeVMs) -> None:
    async def job(vm: Any, item: str) -> str:
        await asyncio.sleep(0.01 if item == "a" else 0)
        return item

    async def items() -> AsyncIterator[str]:
        for letter in "abcdef":
            yield letter

    assert await drain(either.map(job, items(), workers=3, in_order=True)) == list("abcdef")
    assert await drain(either.map(job, [])) == []


async def test_results_come_as_they_are_done_otherwise(vms: FakeVMs) -> None:
    last = asyncio.Event()

    async def job(vm: Any, item: int) -> int:
        if item == 0:
            await last.wait()
        elif item == 5:
            last.set()
        return item

    assert (await drain(vms.map(job, range(6))))[-1] == 0


async def test_the_items_may_be_the_results_of_another_map(either: FakeVMs) -> None:
    results = await drain(either.map(ident, either.map(ident, range(4)), workers=1))
    assert sorted(item for (item, _), _ in results) == [*range(4)]


# Failures


async def test_a_failed_job_cancels_the_rest(vms: FakeVMs) -> None:
    cancelled: list[int] = []

    async def job(vm: Any, item: int) -> int:
        if item != 2:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                cancelled.append(item)
                raise
        await asyncio.sleep(0)
        raise KeyError("two")

    results, group = await drain_until(vms.map(job, range(9), workers=4))
    (failure,) = failures(group)
    assert results == []
    assert (failure.item, failure.index, failure.attempts) == (2, 2, 1)
    assert failure.vm_id in str(failure)
    assert isinstance(failure.__cause__, KeyError)
    assert set(cancelled) == {0, 1, 3}


async def test_failed_jobs_are_collected_and_the_others_go_on(either: FakeVMs) -> None:
    items = [0, 1, 2, 3, 2, 4]
    results, group = await drain_until(
        either.map(fails_at_two, items, workers=3, in_order=True, on_error="collect")
    )
    assert results == [0, 1, 3, 4]
    assert {failure.index for failure in failures(group)} == {2, 4}


async def test_a_job_is_tried_again_on_another_vm(vms: FakeVMs) -> None:
    tried: dict[int, list[str]] = {}

    async def job(vm: Any, item: int) -> int:
        tried.setdefault(item, []).append(vm.vm_id)
        if item == 0 and len(tried[item]) == 1:
            vm.fake.crash()
            await asyncio.sleep(1000)
        if item == 1 and len(tried[item]) < 3:
            raise ValueError("not yet")
        return item

    results = await drain(vms.map(job, range(3), retries=2, reuse=True))
    assert sorted(results) == [0, 1, 2]
    assert [len(set(tried[item])) for item in range(3)] == [2, 3, 1]


async def test_a_failure_tells_how_often_the_job_was_tried(either: FakeVMs) -> None:
    _, group = await drain_until(either.map(fails_at_two, [2], retries=2))
    (failure,) = failures(group)
    assert failure.attempts == 3
    assert "after 3 tries" in str(failure)
    assert len({vm.vm.vm_id for vm in either.made}) == 3


class UnspeakableError(Exception):
    """Can neither be shown nor told."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


class Outcome(BaseException):
    """As those of test frameworks."""


KINDS = [UnspeakableError, Outcome, GeneratorExit]


async def raises(vm: Any, item: int) -> int:
    if 1 <= item <= 3:
        raise KINDS[item - 1]()
    return item


@pytest.mark.parametrize("on_error", ["raise", "collect"])
async def test_whatever_a_job_raises_is_its_items_failure(either: FakeVMs, on_error: str) -> None:
    results, group = await drain_until(either.map(raises, range(5), on_error=on_error))
    failed = sorted(failures(group), key=lambda failure: failure.index)
    if on_error == "collect":
        assert sorted(results) == [0, 4]
        assert [failure.index for failure in failed] == [1, 2, 3]
        assert "UnspeakableError" in str(failed[0])


@pytest.mark.parametrize("on_error", ["raise", "collect"])
async def test_items_that_raise_are_told_of(either: FakeVMs, on_error: str) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("no more")

    results, error = await drain_until(
        either.map(fails_at_two, items(), reuse=True, on_error=on_error)
    )
    if on_error == "collect":
        assert isinstance(error, ExceptionGroup)
        assert {type(error) for error in error.exceptions} == {OSError, JobFailedError}
        assert sorted(results) == [0, 1]


@pytest.mark.parametrize("raised", [StopAsyncIteration, asyncio.CancelledError])
async def test_items_that_raise_what_asyncio_would_misunderstand(
    vms: FakeVMs, raised: type[BaseException]
) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise raised

    with pytest.raises(FleetError, match=raised.__name__):
        await drain(vms.map(ident, items()))


async def test_a_job_that_cancels_itself_has_failed(vms: FakeVMs) -> None:
    async def job(vm: Any, item: int) -> None:
        raise asyncio.CancelledError

    _, group = await drain_until(vms.map(job, [1]))
    cause = failures(group)[0].__cause__
    assert type(cause) is FleetError
    assert "cancelled itself" in str(cause)


@pytest.mark.parametrize("end", ["crash", "delete"])
async def test_only_a_crash_is_a_jobs_failure(vms: FakeVMs, end: str) -> None:
    async def job(vm: Any, item: int) -> str:
        if end == "crash":
            vm.fake.crash()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)
        else:
            await vm.fake.delete()
            await asyncio.sleep(0.01)
        return "done"

    results = vms.map(job, [1])
    if end == "crash":
        _, group = await drain_until(results)
        assert isinstance(failures(group)[0].__cause__, EOFError)
    else:
        assert await anext(results) == "done"
        await drain(results)


async def yields(vm: Any, item: int) -> AsyncIterator[int]:
    yield item


async def alone(vm: Any) -> None:
    pass


def awaits_nothing(vm: Any, item: int) -> int:
    return item


def test_a_job_that_is_not_an_async_function_is_refused() -> None:
    for job in (yields, alone, 5):
        with pytest.raises(ConfigError, match="job="):
            check_work(job, [1])
    with pytest.raises(ConfigError, match="items=5"):
        check_work(ident, 5)
    with pytest.raises(ConfigError, match="reuse=1"):
        check_work(ident, [], reuse=1)


async def test_a_job_that_returns_nothing_to_await_has_failed() -> None:
    with pytest.raises(ConfigError, match="pass an async function"):
        await jobs.awaited(awaits_nothing, SimpleNamespace(), 1)  # type: ignore[arg-type]


# Reuse


async def test_a_vm_that_no_longer_runs_is_not_used_again(vms: FakeVMs) -> None:
    async def job(vm: Any, item: int) -> str:
        vm.fake.runs = False
        return str(vm.vm_id)

    assert len(set(await drain(vms.map(job, range(6), reuse=True)))) == 6


async def test_a_worker_that_waits_for_its_reader_gives_its_vm_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "IDLE", 0.01)
    vms = FakeVMs(places=2)
    unread = vms.map(ident, itertools.count(), reuse=True)
    await anext(unread)
    results = await drain(vms.map(ident, range(3), reuse=True))
    assert sorted(item for item, _ in results) == [0, 1, 2]
    chained = vms.map(ident, vms.map(ident, range(5), reuse=True), reuse=True)
    assert len(await drain(chained)) == 5
    await unread.aclose()  # type: ignore[attr-defined]
    assert all(vm.over.done() for vm in vms.made)
    assert vms.most == 2


async def test_a_worker_that_waits_keeps_its_vm_while_nobody_else_needs_it(
    vms: FakeVMs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "IDLE", 0.001)
    results: Any = vms.map(ident, itertools.count(), reuse=True)
    for _ in range(3):
        await anext(results)
        await asyncio.sleep(0.01)
    await results.aclose()
    assert len(vms.made) == 2


# Readers that are slow, or leave


@pytest.mark.parametrize("in_order", [False, True])
async def test_a_slow_reader_holds_the_jobs_back(either: FakeVMs, in_order: bool) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in itertools.count():
            taken.append(item)
            yield item

    results: Any = either.map(fails_never, items(), reuse=True, in_order=in_order)
    assert await anext(results) in taken
    await until(lambda: len(taken) >= READ_AHEAD * 2)
    for read in range(2, 20):
        assert await anext(results) in taken
        assert len(taken) <= read + READ_AHEAD * 2 + 2
    await results.aclose()


async def fails_never(vm: Any, item: int) -> int:
    return item


async def test_results_that_the_fleet_has_left_behind_are_gone(vms: FakeVMs) -> None:
    endless = asyncio.Event()
    stopped = asyncio.Event()

    async def job(vm: Any, item: int) -> int:
        if item:
            endless.set()
            try:
                await asyncio.sleep(1000)
            finally:
                stopped.set()
        return item

    begun, never_begun = vms.map(job, range(9)), vms.map(job, range(9))
    assert await anext(begun) == 0
    await endless.wait()
    for call in vms.calls:
        await call.end()
    assert stopped.is_set()
    for results in (begun, never_begun):
        with pytest.raises(ConfigError, match="iterate inside the block"):
            await anext(results)


async def test_items_that_swallow_a_cancellation_end_with_the_map(vms: FakeVMs) -> None:
    async def items() -> AsyncIterator[int]:
        for item in range(100):
            with suppress(asyncio.CancelledError):  # as asyncio.wait_for() may
                await asyncio.sleep(0 if item < 2 else 0.05)
            yield item

    results: Any = vms.map(ident, items(), reuse=True)
    await anext(results)
    await results.aclose()
    assert all(vm.over.done() for vm in vms.made)


async def test_a_job_that_ignores_its_cancellation_loses_its_vm(
    vms: FakeVMs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "GRACE", 0.01)

    async def job(vm: Any, item: int) -> None:
        while not vm.fake.over.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([vm.fake.over])

    waiting: asyncio.Future[Any] = asyncio.ensure_future(next_of(vms.map(job, [1])))
    await until(lambda: vms.made)
    await asyncio.sleep(0.005)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert vms.made[0].over.done()


def next_of(results: AsyncIterator[Any]) -> Awaitable[Any]:
    async def get() -> Any:
        return await anext(results)

    return get()


async def waits(vm: Any, item: int) -> int:
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return item


@pytest.mark.parametrize("reuse", [False, True])
async def test_a_map_that_is_cancelled_at_any_moment_leaves_nothing(
    either: FakeVMs, reuse: bool
) -> None:
    for step in range(1000):
        draining = asyncio.ensure_future(drain(either.map(waits, range(6), reuse=reuse)))
        for _ in range(step):
            await asyncio.sleep(0)
        if not draining.cancel():
            break
        with pytest.raises(asyncio.CancelledError):
            await draining
        await until(lambda: all(vm.over.done() for vm in either.made))
    assert sorted(await draining) == [*range(6)]
    assert step > 10
