"""`map()`: jobs, each with a VM, and their results."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from smolvm_async.config.checks import shown, told
from smolvm_async.errors import (
    ConfigError,
    JobFailedError,
    MemberFailedError,
    VMNotRunningError,
)
from smolvm_async.fleet.member import Member
from smolvm_async.foundation.tasks import end_tasks, settle, take_exception
from smolvm_async.vm.vm import AsyncSmolVM

T = TypeVar("T")
R = TypeVar("R")

Job = Callable[[AsyncSmolVM, T], Awaitable[R]]
OnError = Literal["raise", "collect"]

READ_AHEAD = 4  # results for each job that can be done at once: a slow reader must not fill memory
IDLE = 0.2  # seconds that a VM without a job is kept, while others wait for a place
GRACE = 2.0  # seconds that a cancelled job may go on using its VM, to clean up
FLEET_OVER = "the fleet's block has ended before all results were read: iterate within it."


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """What has become of one item."""

    index: int
    value: R | None
    error: JobFailedError | None


class Items(Generic[T]):
    """The items, one at a time, to whoever asks next."""

    def __init__(self, items: Iterable[T] | AsyncIterable[T]) -> None:
        self._items = items if isinstance(items, AsyncIterable) else iter(items)
        self._iterator = aiter(items) if isinstance(items, AsyncIterable) else None
        self._turn = asyncio.Lock()
        self._count = 0

    async def next(self) -> tuple[int, T] | None:
        """The next one and its number; `None` if there is no more."""
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
                except (asyncio.CancelledError, StopAsyncIteration) as error:  # nobody's business
                    raise RuntimeError(f"the items have raised {error!r}") from error
            self._count += 1
            return self._count - 1, item


class Stream(Generic[T, R]):
    """The results of one call of `map()`, as its tasks find them."""

    def __init__(self, items: Items[T]) -> None:
        self._items = items
        self._outcomes: asyncio.Queue[Outcome[R] | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._unread = 0  # outcomes that the user has not come to yet
        self._was_read = asyncio.Event()
        self._over = False
        self._check: Callable[[], object] = lambda: None
        self._on_error: OnError = "raise"

    async def results(self, workers: int, in_order: bool, on_error: OnError) -> AsyncIterator[R]:
        """The results; then, or at once, an `ExceptionGroup` of what failed."""
        if self._over:
            raise ConfigError(FLEET_OVER)
        self._check()
        self._on_error = on_error
        self._tasks = [asyncio.ensure_future(self._work()) for _ in range(workers)]
        for task in self._tasks:
            task.add_done_callback(lambda _: self._outcomes.put_nowait(None))
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
        errors = map(_error_of, self._tasks)
        broken = next((error for error in errors if error is not None), None)
        if broken is not None and failures:
            raise ExceptionGroup(
                f"the items have raised, and {len(failures)} of the jobs failed",
                [broken, *failures],
            )
        if broken is not None:
            raise broken
        if failures:
            raise ExceptionGroup(f"{len(failures)} of the jobs failed", failures)

    async def end(self) -> None:
        """Cancel what is left of it; when this returns, that has ended."""
        self._over = True
        self._was_read.set()
        await end_tasks(*self._tasks)

    async def _until_done(self) -> AsyncIterator[Outcome[R]]:
        working = len(self._tasks)
        while working:
            outcome = await self._outcomes.get()
            if outcome is not None:
                yield outcome
                continue
            working -= 1
            ended = [task for task in self._tasks if task.done()]
            if any(task.cancelled() for task in ended):
                raise ConfigError(FLEET_OVER)
            if self._on_error == "raise" and any(_error_of(task) is not None for task in ended):
                return  # the items have raised something

    def _report(self, outcome: Outcome[R]) -> None:
        self._unread += 1
        self._outcomes.put_nowait(outcome)

    async def _next(self, places: int) -> tuple[int, T] | None:
        """The next item, if any, once not many more results than `places` are unread."""
        while self._unread >= READ_AHEAD * places and not self._over:
            self._was_read.clear()
            await self._was_read.wait()
        numbered = None if self._over else await self._items.next()
        return None if self._over else numbered  # the items may have swallowed our cancellation

    async def _work(self) -> None:
        """Do items' jobs, one after another, until there are no more."""
        raise NotImplementedError


def _error_of(task: asyncio.Task[None]) -> Exception | None:
    error = take_exception(task)
    if error is not None and not isinstance(error, Exception):
        raise error
    return error


class Jobs(Stream[T, R]):
    """One call of `map()`.

    Args:
        check: Raises a `ConfigError` if there can be no VM for a job.
        take: Gives a VM, which may have to boot yet.
        retries: How often a job that has failed is tried again, on another VM.
        reuse: Whether a VM does one job after another.
    """

    def __init__(
        self,
        check: Callable[[], object],
        take: Callable[[], Member],
        job: Job[T, R],
        items: Items[T],
        retries: int,
        reuse: bool,
    ) -> None:
        super().__init__(items)
        self._check = check
        self._take = take
        self._job = job
        self._retries = retries
        self._reuse = reuse

    async def _work(self) -> None:
        member: Member | None = None
        try:
            while True:
                getting = asyncio.ensure_future(self._next(len(self._tasks)))
                try:
                    while member is not None and not getting.done():
                        _, late = await asyncio.wait([getting], timeout=IDLE)
                        if late and member.wanted:  # perhaps by whom our reader waits for
                            await member.release()
                            member = None
                    numbered = await getting
                finally:
                    await end_tasks(getting)
                if numbered is None:
                    break
                member = await self._do(*numbered, member)
        finally:
            if member is not None:
                await member.release()

    async def _do(self, index: int, item: T, member: Member | None) -> Member | None:
        """Do one item's job, as often as need be; returns the VM if it can be used again."""
        if member is not None and not await member.usable():
            await member.release()
            member = None
        for attempt in range(1, self._retries + 2):
            if self._over:
                break
            member = member or self._take()
            try:
                value = await attempt_job(member, self._job, item)
            except Exception as error:
                await member.release()
                if attempt > self._retries:
                    failure = job_failure(index, item, member.vm.vm_id, attempt, error)
                    self._report(Outcome(index, None, failure))
                member = None
            except BaseException:
                await member.release()
                raise
            else:
                self._report(Outcome(index, value, None))
                break
        if member is not None and (not self._reuse or member.over.done()):
            await member.release()
            member = None
        return member


async def attempt_job(member: Member, job: Job[T, R], item: T) -> R:
    """Do the job; a crash of the VM cancels it."""
    vm = await asyncio.shield(member.ready)
    doing = asyncio.ensure_future(_do(job, vm, item))
    either: list[asyncio.Future[Any]] = [doing, member.over]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        crash = None if doing.done() else member.error
        if crash is None:  # the job may have ended the VM itself
            await asyncio.wait([doing])
    finally:
        doing.cancel()
        await settle(_end(doing, member))
    if crash is not None:
        raise crash
    if doing.cancelled():
        raise VMNotRunningError(f"the job on {vm.vm_id} has cancelled itself.")
    return doing.result()


async def awaited(job: Job[T, R], vm: AsyncSmolVM, item: T) -> R:
    """What the job returns.

    Raises:
        ConfigError: It is no async function.
    """
    work = job(vm, item)
    if not inspect.isawaitable(work):
        raise ConfigError(
            f"job={shown(job)} is wrong: it returns {shown(work)}, which cannot be awaited; make "
            "it an async function."
        )
    return await work


async def _do(job: Job[T, R], vm: AsyncSmolVM, item: T) -> R:
    try:
        return await job(vm, item)
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # such as those of test frameworks
        raise RuntimeError(f"the job has raised {shown(error)}") from error


async def _end(doing: asyncio.Task[Any], member: Member) -> None:
    """Wait for a job that was cancelled; one that does not heed that loses its VM."""
    _, heedless = await asyncio.wait([doing], timeout=GRACE)
    if heedless:
        member.let_go()
        await asyncio.wait(heedless)
    take_exception(doing)


def job_failure(
    index: int, item: object, vm_id: str, attempts: int, error: BaseException
) -> JobFailedError:
    """What is raised for an item whose job has failed, because of `error`."""
    if isinstance(error, MemberFailedError) and error.__cause__ is not None:
        error = error.__cause__
    where = f" on {vm_id}" if vm_id else ""
    tries = f", after {attempts} tries" if attempts > 1 else ""
    what = f"item {index} ({shown(item)}){where}{tries}"
    failure = JobFailedError(f"{what}: {told(error)}", item, index, vm_id, attempts)
    failure.__cause__ = error
    return failure
