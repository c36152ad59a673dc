"""On the client: `map()` on Dask workers, each try of a job a task; needs `distributed`."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from distributed import KilledWorker
from distributed.client import FutureCancelledError

from smolvm_async.config.checks import told
from smolvm_async.errors import RemoteError, WorkerLostError
from smolvm_async.fleet.dask.messages import (
    CLAIM,
    RESOURCE,
    JobReply,
    JobRequest,
    dumps,
    loads,
    unpack,
)
from smolvm_async.fleet.dask.worker import end_call, perform, prune
from smolvm_async.fleet.jobs import Items, Outcome, R, Stream, T, job_failure
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import settle, take_exception
from smolvm_async.qemu.events import BootState

logger = get_logger(__name__)

ENDING = 30.0  # seconds for the workers to end the VMs of what was cancelled
V = TypeVar("V")

LOOKING = 1.0  # between two looks at what workers there are


class Window:
    """How many jobs may be with the scheduler at once: what the workers can do, or one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._capacity = 0
        self._busy = 0
        self._news = asyncio.Event()

    @property
    def size(self) -> int:
        """How many places there are."""
        return max(1, min(self._capacity, self._most))

    async def enter(self) -> None:
        """Wait for a place."""
        while self._busy >= self.size:
            self._news.clear()
            await self._news.wait()
        self._busy += 1

    def leave(self) -> None:
        """Give it back."""
        self._busy -= 1
        self._news.set()

    def resize(self, capacity: int) -> None:
        """The workers are others now."""
        self._capacity = capacity
        self._news.set()


class Workers:
    """The workers, as the client sees them: how much they can do, and which are lost.

    Args:
        client: Dask's, asynchronous and ours alone.
        need: MiB that a VM takes.
        most: How many VMs there may be at once.
    """

    def __init__(self, client: Any, need: int, most: int) -> None:
        self.client = client
        self.window = Window(most)
        self.largest = self.count = 0  # MiB of the largest worker; workers
        self._need = need
        self._lost = False
        self._gone: dict[str, asyncio.Event] = {}  # set once the worker of this address is lost
        self._claimed: dict[str, asyncio.Future[str]] = {}
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def begin(self) -> None:
        """Look at the workers, and again whenever some come or go."""
        self.client.subscribe_topic("all", self._on_event)
        await self._look()
        self.start(self._watch())

    async def end(self, template: bytes) -> None:
        """Stop looking; what lost workers have left on disk is removed, if they are back."""
        if self._lost:
            await self.everywhere(prune, template)
        self.client.unsubscribe_topic("all")
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def everywhere(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have each worker run a function, for as long as it may take, or until it is lost."""
        try:
            async with asyncio.timeout(ENDING):
                asking = [self._ask(worker, function, arguments) for worker in await self._look()]
                await asyncio.gather(*asking)
        except TimeoutError:
            logger.warning(
                "some Dask workers had not ended what was cancelled after %g s: they go on with "
                "that, and their VMs may still run",
                ENDING,
            )
        except Exception as error:  # the scheduler is gone, and its workers end themselves
            logger.warning("the Dask workers cannot be asked: %s", error)

    async def _ask(self, worker: str, function: Callable[..., Any], arguments: Any) -> None:
        """Dask itself would try for 30 s to connect to one that has just died."""
        run = self.client.run(function, *arguments, workers=[worker], on_error="ignore")
        asking = self.start(_awaited(run))
        gone = self.start(self._gone.setdefault(worker, asyncio.Event()).wait())
        try:
            await asyncio.wait([asking, gone], return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
        finally:
            asking.cancel()
            gone.cancel()

    def claim(self, key: str) -> asyncio.Future[str]:
        """Done with the address of the worker that had begun this task, once it is lost."""
        lost = self._claimed[key] = asyncio.get_running_loop().create_future()
        lost.add_done_callback(lambda _: self._claimed.pop(key, None))
        return lost

    def start(self, coroutine: Coroutine[Any, Any, V]) -> asyncio.Task[V]:
        """Run something beside, at most until the fleet ends."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        take_exception(task)

    async def _watch(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOKING):
                    await self._news.wait()
            self._news.clear()
            with suppress(Exception):  # a scheduler that is gone fails the tasks themselves
                await self._look()

    async def _look(self) -> Sequence[str]:
        """See which workers there are: their addresses."""
        found = (await self.client.scheduler.identity(n_workers=-1))["workers"]
        workers = found.values()
        offers = [int(worker["resources"].get(RESOURCE, 0)) for worker in workers]
        self.count, self.largest = len(offers), max(offers, default=0)
        places = (
            min(int(worker["nthreads"]), offer // self._need)
            for worker, offer in zip(workers, offers, strict=True)
        )
        self.window.resize(sum(places))
        return [*found]

    def _on_event(self, event: Any) -> None:
        _, message = event
        action = message.get("action") if isinstance(message, dict) else None
        if action in ("add-worker", "remove-worker"):
            self._news.set()
        if action == "add-worker":
            self._gone.pop(message["worker"], None)
        if action == "remove-worker":
            self._lost = True
            self._gone.setdefault(message["worker"], asyncio.Event()).set()
            for name in ("processing-tasks", "lost-computed-tasks"):
                for key in self._claimed.keys() & set(message.get(name, ())):
                    self.start(self._give_up(key, message["worker"]))

    async def _give_up(self, key: str, worker: str) -> None:
        """If a worker that is lost had begun a task, nobody else may: do not wait for it."""
        with suppress(OSError):  # the scheduler is gone too
            begun = await self.client.scheduler.get_metadata(keys=[key, CLAIM], default="")
            lost = self._claimed.get(key)
            if begun == worker and lost is not None and not lost.done():
                lost.set_result(worker)


class RemoteJobs(Stream[T, R]):
    """One call of `map()`.

    Args:
        fleet: The fleet's id.
        template: The arguments of its VMs, pickled.
        need: MiB of a VM.
        retries: How often a job that has failed is tried again.
        rerun: Whether a job whose worker is lost is done again by another one.
    """

    def __init__(
        self,
        workers: Workers,
        fleet: str,
        template: bytes,
        need: int,
        until: BootState,
        job: bytes,
        items: Items[T],
        retries: int,
        rerun: bool,
    ) -> None:
        super().__init__(items)
        self._workers = workers
        self._request = JobRequest(
            fleet, f"smolvm-{uuid.uuid4().hex}", "", template, job, b"", until, rerun
        )
        self._need = need
        self._retries = retries
        self._loose = False  # whether a task was left to the workers

    async def _work(self) -> None:
        """Hand out the items, as there are places."""
        doing: set[asyncio.Task[None]] = set()
        broken: Exception | None = None

        def finish(task: asyncio.Task[None]) -> None:
            self._workers.window.leave()
            if take_exception(task) is None:
                doing.discard(task)

        try:
            while True:
                try:
                    numbered = await self._next(self._workers.window.size)
                except Exception as error:
                    if self._on_error == "raise":
                        raise
                    broken = error  # what has begun goes on
                    break
                if numbered is None:
                    break
                await self._workers.window.enter()
                task = asyncio.ensure_future(self._do(*numbered))
                doing.add(task)
                task.add_done_callback(finish)
            if doing:
                await asyncio.wait(doing)
            for task in doing:  # that has found no outcome
                task.result()
            if broken is not None:
                raise broken
        finally:
            await settle(self._abandon(doing))

    async def _abandon(self, doing: set[asyncio.Task[None]]) -> None:
        """Cancel what is not done; when this returns, the workers have ended its VMs."""
        for task in list(doing):
            task.cancel()
        if doing:
            await asyncio.wait(doing)
        if self._loose:
            await self._workers.everywhere(end_call, self._request.call)

    async def _do(self, index: int, item: T) -> None:
        """Have one item's job done, as often as need be."""
        for attempt in range(1, self._retries + 2):
            vm_id = ""
            again = attempt <= self._retries
            try:
                report = await self._try(f"{self._request.call}-{index}-{attempt}", dumps(item))
                vm_id = report.vm_id
                again = again and report.value is None  # what cannot be loaded never can
                outcome: Outcome[R] = Outcome(index, _value(report), None)
            except Exception as error:
                if again and not isinstance(error, WorkerLostError):
                    continue
                failure = job_failure(index, item, vm_id, attempt, error)
                outcome = Outcome(index, None, failure)
            self._report(outcome)
            return

    async def _try(self, key: str, item: bytes) -> JobReply:
        """Have a worker try it once; Dask may have another one do so if that is lost."""
        request = replace(self._request, key=key, item=item)
        lost = self._workers.claim(key)
        future = self._workers.client.submit(
            perform, request, key=key, resources={RESOURCE: self._need}, pure=False
        )
        getting = self._workers.start(_result(future))
        either: list[asyncio.Future[Any]] = [getting, lost]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                raise _lost(lost.result())
            return getting.result()
        finally:
            lost.cancel()
            if future.status == "finished" and not getting.done():
                # Its result is being fetched, together with those of others, whom a cancellation
                # would hit, too.
                getting.add_done_callback(lambda _: future.release())
            else:
                self._loose |= not getting.done()
                future.release()  # which has Dask cancel it, if it is not done; `getting` ends


async def _awaited(work: Awaitable[V]) -> V:
    return await work


async def _result(future: Any) -> JobReply:
    try:
        report = await future
    except KilledWorker as error:
        raise WorkerLostError(f"its workers died, one after another: {error}") from error
    except FutureCancelledError as error:
        raise WorkerLostError(f"the Dask scheduler has let go of it: {error.reason}.") from error
    assert isinstance(report, JobReply)
    if report.lost:
        raise _lost(report.lost)
    return report


def _lost(worker: str) -> WorkerLostError:
    return WorkerLostError(
        f"the Dask worker {worker} was lost while it did this job, and rerun=False: the job may "
        "have been done in part."
    )


def _value(report: JobReply) -> Any:
    if report.value is None:
        error = unpack(report.errors)
        if not isinstance(error, Exception):
            raise RemoteError(told(error)) from error
        raise error
    return loads(report.value)
