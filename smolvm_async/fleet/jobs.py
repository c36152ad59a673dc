"""`map()`: run a job on a VM for each item, and yield the results.

A call of `map()` is a `MapCall`: worker tasks take the items, run the jobs and queue an `Outcome`
for each item; the generator `results()`, which the caller iterates over, reads the queue.
`LocalMapCall` runs the jobs in this process, `DaskMapCall` of `fleet/dask/client.py` on workers.

A `LocalMapCall` has one worker for each VM that `map()` may use at once. Each worker repeats:

1. Wait while too many results are unread: a slow reader of endless items would fill the memory.
2. Take the next item. The workers share the iterator, so they take items one after the other.
   With `reuse`, a worker that waits in step 1 or 2 keeps its VM for the next job. It deletes the VM
   after `IDLE` seconds if another VM waits for a place or memory: the reader or the items may need
   that other VM to continue, for example if one `map()` reads its items from another `map()`.
3. Run the job: on the VM of the previous job if that VM still runs, otherwise on a new VM. A crash
   of the VM cancels the job. After a failure, retry on a new VM, at most `retries` times.
4. Queue the outcome: a value, or a `JobFailedError`.

A worker ends after the last item, or with the exception that the items raised. Each worker that
ends queues `None`, so `results()` knows when the last worker has ended. A cancelled worker cancels
its job, deletes its VM, then ends: when `end()` returns, no job and no VM of the call is left.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from smolvm_async.config.checks import check_boolean, check_integer, shown, told
from smolvm_async.errors import ConfigError, FleetError, JobFailedError, MemberFailedError
from smolvm_async.fleet.member import Member
from smolvm_async.foundation.fork import this_process
from smolvm_async.foundation.tasks import check_loop, end_tasks, settle, take_exception
from smolvm_async.vm.vm import AsyncSmolVM

T = TypeVar("T")
R = TypeVar("R")

Job = Callable[[AsyncSmolVM, T], Awaitable[R]]
OnError = Literal["raise", "collect"]

MAX_COUNT = 100_000  # the maximum of VMs, jobs or retries
READ_AHEAD = 4  # the maximum of unread results for each job that can run at once
IDLE = 0.2  # seconds that a worker without a job keeps its VM while other VMs wait
GRACE = 2.0  # seconds for which a cancelled job may still use its VM, to clean up
FLEET_OVER = "the fleet's block ended before all results were read: iterate inside the block."


def check_count(argument: str, value: object, least: int = 1) -> int:
    """Check a whole number that was passed to a fleet or to `map()`, and return it."""
    advice = f"a whole number from {least} to {MAX_COUNT}"
    return check_integer(argument, value, least, MAX_COUNT, advice)


def check_warm(warm: object) -> int:
    """Check the argument `warm` of a fleet; return the number of VMs to keep ready."""
    if warm is None or isinstance(warm, bool):
        return 0
    advice = f"True, False, or a whole number from 1 to {MAX_COUNT}"
    return check_integer("warm", warm, 1, MAX_COUNT, advice)


def check_on_error(on_error: object) -> OnError:
    """Check the argument `on_error` of a fleet or of `map()`, and return it."""
    if on_error not in ("raise", "collect"):
        raise ConfigError(f"on_error={shown(on_error)} is wrong: pass 'raise' or 'collect'.")
    return on_error


def check_work(job: object, items: object, retries: object = 0, **switches: object) -> None:
    """Check the job, the items, the retries and the boolean arguments of `map()`."""
    if not callable(job) or inspect.isgeneratorfunction(job) or inspect.isasyncgenfunction(job):
        raise ConfigError(f"job={shown(job)} is wrong: pass an async function of (vm, item).")
    try:
        inspect.signature(job).bind(None, None)
    except ValueError:
        pass  # a built-in function may have no signature
    except TypeError as error:
        raise ConfigError(
            f"job={shown(job)} cannot be called with a VM and an item ({error}): pass an async "
            "function of (vm, item)."
        ) from None
    if not isinstance(items, Iterable | AsyncIterable):
        raise ConfigError(f"items={shown(items)} is wrong: pass an iterable or async iterable.")
    for name, value in switches.items():
        check_boolean(name, value)
    check_count("retries", retries, least=0)


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """The result of one item's job, or its failure."""

    index: int
    value: R | None
    error: JobFailedError | None


class NumberedItems(Generic[T]):
    """The items of a `map()` call, numbered; several workers share them."""

    def __init__(self, items: Iterable[T] | AsyncIterable[T]) -> None:
        self._items = items if isinstance(items, AsyncIterable) else iter(items)
        self._iterator = aiter(items) if isinstance(items, AsyncIterable) else None
        self._turn = asyncio.Lock()
        self._count = 0

    async def next(self) -> tuple[int, T] | None:
        """Return the next item with its number, or `None` after the last item."""
        async with self._turn:
            if self._iterator is not None:
                try:
                    item = await anext(self._iterator)
                except StopAsyncIteration:
                    return None
            else:
                assert not isinstance(self._items, AsyncIterable)
                try:
                    item = next(self._items)
                except StopIteration:
                    return None
                except (asyncio.CancelledError, StopAsyncIteration) as error:
                    # asyncio would mistake these for our own task's cancellation or end.
                    raise FleetError(f"the items raised {error!r}") from error
            self._count += 1
            return self._count - 1, item


class MapCall(Generic[T, R]):
    """One call of `map()`: its workers, and the results that they queue."""

    def __init__(self, items: Iterable[T] | AsyncIterable[T], retries: int) -> None:
        self._items = NumberedItems(items)
        self._retries = retries
        self._outcomes: asyncio.Queue[Outcome[R] | None] = asyncio.Queue()
        self._workers: list[asyncio.Task[None]] = []
        self._process = this_process()
        self._unread = 0  # queued outcomes that the caller has not read yet
        self._was_read = asyncio.Event()
        self._over = False
        self._check: Callable[[], object] = lambda: None
        self._on_error: OnError = "raise"

    async def results(self, workers: int, in_order: bool, on_error: OnError) -> AsyncIterator[R]:
        """Yield the results. If jobs failed, raise an `ExceptionGroup` of the failures at the end.

        With `on_error="raise"`, raise as soon as the first job fails.
        """
        if self._over:
            raise ConfigError(FLEET_OVER)
        self._check()
        self._on_error = on_error
        self._workers = [asyncio.ensure_future(self._work()) for _ in range(workers)]
        for worker in self._workers:
            worker.add_done_callback(lambda _: self._outcomes.put_nowait(None))
        failures: list[JobFailedError] = []
        early: dict[int, Outcome[R]] = {}
        following = 0
        try:
            async for outcome in self._until_done():
                if outcome.error is not None:
                    failures.append(outcome.error)
                    if on_error == "raise":
                        break
                early[outcome.index] = outcome
                while due := early.pop(following if in_order else outcome.index, None):
                    following += 1
                    if due.error is None:
                        yield due.value  # type: ignore[misc]
                    self._unread -= 1
                    self._was_read.set()
        finally:
            await self.end()
        errors = map(_error_of, self._workers)
        broken = next((error for error in errors if error is not None), None)
        if broken is not None and failures:
            raise ExceptionGroup(
                f"the items raised an exception, and {len(failures)} of the jobs failed",
                [broken, *failures],
            )
        if broken is not None:
            raise broken
        if failures:
            raise ExceptionGroup(f"{len(failures)} of the jobs failed", failures)

    async def end(self) -> None:
        """Cancel the workers; wait until they, their jobs and their VMs have ended."""
        self._over = True
        self._was_read.set()
        await end_tasks(*self._workers)

    async def _until_done(self) -> AsyncIterator[Outcome[R]]:
        """Yield outcomes until all workers have ended, or until the items raise an exception."""
        working = len(self._workers)
        while working:
            self._process.check("map()", "Make a new fleet in this process.")
            check_loop(self._workers[0].get_loop(), "this call of map()")
            outcome = await self._outcomes.get()
            if outcome is not None:
                yield outcome
                continue
            working -= 1
            ended = [worker for worker in self._workers if worker.done()]
            if any(worker.cancelled() for worker in ended):
                raise ConfigError(FLEET_OVER)
            if self._on_error == "raise" and any(_error_of(worker) for worker in ended):
                return  # the items raised an exception

    def _queue(self, outcome: Outcome[R]) -> None:
        self._unread += 1
        self._outcomes.put_nowait(outcome)

    async def _next(self, places: int) -> tuple[int, T] | None:
        """Wait while too many results are unread for `places` jobs; return the next item."""
        while self._unread >= READ_AHEAD * places and not self._over:
            self._was_read.clear()
            await self._was_read.wait()
        numbered = None if self._over else await self._items.next()
        return None if self._over else numbered  # the items may have suppressed our cancellation

    async def _work(self) -> None:
        """Run jobs until no item is left."""
        raise NotImplementedError


def _error_of(worker: asyncio.Task[None]) -> Exception | None:
    error = take_exception(worker)
    if error is not None and not isinstance(error, Exception):
        raise error
    return error


class LocalMapCall(MapCall[T, R]):
    """A call of `map()` on VMs of this process; the module's docstring explains the worker loop.

    Args:
        check: Raises a `ConfigError` if a job could never get a VM.
        take: Returns a VM for a job; the VM may still be booting.
    """

    def __init__(
        self,
        check: Callable[[], object],
        take: Callable[[], Member],
        job: Job[T, R],
        items: Iterable[T] | AsyncIterable[T],
        retries: int,
        reuse: bool,
    ) -> None:
        super().__init__(items, retries)
        self._check = check
        self._take = take
        self._job = job
        self._reuse = reuse

    async def _work(self) -> None:
        member: Member | None = None
        try:
            while True:
                getting = asyncio.ensure_future(self._next(len(self._workers)))
                try:
                    while member is not None and not getting.done():
                        _, late = await asyncio.wait([getting], timeout=IDLE)
                        if late and member.others_wait:
                            await member.delete()
                            member = None
                    numbered = await getting
                finally:
                    await end_tasks(getting)
                if numbered is None:
                    break
                member = await self._do(*numbered, member)
        finally:
            if member is not None:
                await member.delete()

    async def _do(self, index: int, item: T, member: Member | None) -> Member | None:
        """Run the job of one item, with retries; return the VM if it can be used again."""
        if member is not None and not await member.usable():
            await member.delete()
            member = None
        for attempt in range(1, self._retries + 2):
            if self._over:
                break
            member = member or self._take()
            try:
                value = await attempt_job(member, self._job, item)
            except Exception as error:
                await member.delete()
                if attempt > self._retries:
                    failure = job_failure(index, item, member.vm.vm_id, attempt, error)
                    self._queue(Outcome(index, None, failure))
                member = None
            except BaseException:
                await member.delete()
                raise
            else:
                self._queue(Outcome(index, value, None))
                break
        if member is not None and (not self._reuse or member.over.done()):
            await member.delete()
            member = None
        return member


async def attempt_job(member: Member, job: Job[T, R], item: T) -> R:
    """Wait for the VM and run the job; cancel the job if the VM crashes."""
    running = asyncio.ensure_future(_call(job, await asyncio.shield(member.ready), item))
    either: list[asyncio.Future[Any]] = [running, member.over]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        crash = None if running.done() else member.error
        if crash is None:  # the job itself may have stopped the VM
            await asyncio.wait([running])
    finally:
        running.cancel()
        await settle(_end(running, member))
    if crash is not None:
        raise crash
    if running.cancelled():
        raise FleetError(f"the job on {member.vm.vm_id} cancelled itself.")
    return running.result()


async def awaited(job: Job[T, R], vm: AsyncSmolVM, item: T) -> R:
    """Call the job and await its result; check that it is an async function."""
    work = job(vm, item)
    if not inspect.isawaitable(work):
        raise ConfigError(
            f"job={shown(job)} is wrong: it returns {shown(work)}, which cannot be awaited: pass "
            "an async function of (vm, item)."
        )
    return await work


async def _call(job: Job[T, R], vm: AsyncSmolVM, item: T) -> R:
    try:
        return await job(vm, item)
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # test frameworks raise such exceptions
        raise RuntimeError(f"the job raised {shown(error)}") from error


async def _end(running: asyncio.Task[Any], member: Member) -> None:
    """Wait for a cancelled job; delete the VM of a job that ignores its cancellation."""
    _, ignoring = await asyncio.wait([running], timeout=GRACE)
    if ignoring:
        member.delete_soon()
        await asyncio.wait(ignoring)
    take_exception(running)


def job_failure(
    index: int, item: object, vm_id: str, attempts: int, error: BaseException
) -> JobFailedError:
    """Return the exception for an item whose job failed because of `error`."""
    if isinstance(error, MemberFailedError) and error.__cause__ is not None:
        error = error.__cause__
    where = f" on {vm_id}" if vm_id else ""
    tries = f", after {attempts} tries" if attempts > 1 else ""
    job = f"item {index} ({shown(item)}){where}{tries}"
    failure = JobFailedError(f"{job}: {told(error)}", item, index, vm_id, attempts)
    failure.__cause__ = error
    return failure
