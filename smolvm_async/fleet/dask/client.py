"""The client's side of a `DaskFleet`: `map()` on Dask workers; needs `distributed`.

Each attempt of a job is a separate Dask task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from distributed import KilledWorker
from distributed.client import FutureCancelledError

from smolvm_async.config.checks import told
from smolvm_async.errors import HostError, RemoteError, WorkerLostError
from smolvm_async.fleet.dask.messages import (
    RESOURCE,
    STARTED_BY,
    VERSION,
    JobReply,
    JobRequest,
    check_version,
    dumps,
    loads,
    unpack,
    version_asker,
)
from smolvm_async.fleet.dask.worker import end_call, perform, prune, snapshot_memory
from smolvm_async.fleet.jobs import MapCall, Outcome, R, T, job_failure
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import end_tasks, settle, take_exception

logger = get_logger(__name__)

ENDING = 30.0  # seconds that the workers get to delete the VMs of cancelled jobs
LOOK_AGAIN = 1.0  # seconds between two checks of the workers
V = TypeVar("V")


async def check_versions(client: Any) -> None:
    """Check that the scheduler and all workers have this client's version of the package."""
    asker = version_asker()
    check_version(VERSION, await client.run_on_scheduler(asker), "scheduler")
    for worker, version in (await client.run(asker, on_error="ignore")).items():
        check_version(VERSION, version, f"worker {worker}")


async def find_memory(client: Any, template: bytes, name: str) -> int:
    """Ask the workers for the memory of the VM of a snapshot, in MiB; wait for the first worker.

    Raises:
        HostError: No worker has the snapshot.
    """
    if not (await client.scheduler.identity())["workers"]:
        logger.warning("there are no Dask workers yet: the first one has to look at %r", name)
        await client.wait_for_workers(1)
    found = await client.run(snapshot_memory, template, name)
    if not any(found.values()):
        raise HostError(
            f"none of the Dask workers ({', '.join(found)}) has a snapshot named {name!r} in its "
            "data directory.",
            hint="Take the snapshot on the workers' hosts, or pass the data_dir that has it.",
            missing=("snapshot",),
        )
    return int(max(found.values()))


class JobWindow:
    """The limit of jobs submitted at once: the number that the workers can run, at least 1."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._capacity = 0
        self._busy = 0
        self._changed = asyncio.Event()

    @property
    def size(self) -> int:
        """The number of jobs that may be submitted at once."""
        return max(1, min(self._capacity, self._most))

    async def enter(self) -> None:
        """Wait until another job may be submitted."""
        while self._busy >= self.size:
            self._changed.clear()
            await self._changed.wait()
        self._busy += 1

    def leave(self) -> None:
        """Note that a job is done."""
        self._busy -= 1
        self._changed.set()

    def resize(self, capacity: int) -> None:
        """Note how many jobs the workers can run now."""
        self._capacity = capacity
        self._changed.set()


class Workers:
    """The client's view of the workers: how many jobs they can run, and which workers are lost.

    Args:
        client: An asynchronous Dask client that only this fleet uses.
        need: The MiB that a VM needs.
        most: The maximum number of VMs that run at once.
    """

    def __init__(self, client: Any, need: int, most: int) -> None:
        self.client = client
        self.window = JobWindow(most)
        self.largest = self.count = 0  # MiB of the largest worker; number of workers
        self.need = need
        self._lost = False
        self._gone: dict[str, asyncio.Event] = {}  # by address; set once the worker is lost
        self._watched: dict[str, asyncio.Future[str]] = {}  # by the task's key
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def begin(self) -> None:
        """Count the workers now, and again whenever a worker joins or leaves."""
        self.client.subscribe_topic("all", self._on_event)
        await self.look()
        self.start(self._watch())

    async def end(self, template: bytes) -> None:
        """Stop watching. If a worker was lost, ask the remaining workers to delete its VMs."""
        if self._lost:
            await self.everywhere(prune, template)
        self.client.unsubscribe_topic("all")
        await end_tasks(*self._tasks)

    async def everywhere(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a function on each worker, for at most `ENDING` seconds."""
        try:
            async with asyncio.timeout(ENDING):
                asking = [self._ask(worker, function, arguments) for worker in await self.look()]
                await asyncio.gather(*asking)
        except TimeoutError:
            logger.warning(
                "some Dask workers did not end their cancelled jobs within %g s; the VMs may run a "
                "little longer",
                ENDING,
            )
        except Exception as error:  # the scheduler is gone, so the workers exit
            logger.warning("cannot reach the Dask workers: %s", error)

    async def _ask(self, worker: str, function: Callable[..., Any], arguments: Any) -> None:
        """Run a function on a worker; stop if the worker is lost: Dask would retry for 30 s."""
        run = self.client.run(function, *arguments, workers=[worker], on_error="ignore")
        asking = self.start(run)
        gone = self.start(self._gone.setdefault(worker, asyncio.Event()).wait())
        try:
            await asyncio.wait([asking, gone], return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
        finally:
            asking.cancel()
            gone.cancel()

    def watch_task(self, key: str) -> asyncio.Future[str]:
        """Return a future for the address of the worker that began this task and was lost."""
        lost = self._watched[key] = asyncio.get_running_loop().create_future()
        lost.add_done_callback(lambda _: self._watched.pop(key, None))
        return lost

    def start(self, coroutine: Coroutine[Any, Any, V]) -> asyncio.Task[V]:
        """Start a background task, which lasts at most until the fleet ends."""
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
                async with asyncio.timeout(LOOK_AGAIN):
                    await self._changed.wait()
            self._changed.clear()
            with suppress(Exception):  # without a scheduler, Dask fails the tasks itself
                await self.look()

    async def look(self) -> Sequence[str]:
        """Count the workers and the jobs that they can run; return the workers' addresses."""
        found = (await self.client.scheduler.identity(n_workers=-1))["workers"]
        workers = found.values()
        offers = [int(worker["resources"].get(RESOURCE, 0)) for worker in workers]
        self.count, self.largest = len(offers), max(offers, default=0)
        places = (
            min(int(worker["nthreads"]), offer // self.need)
            for worker, offer in zip(workers, offers, strict=True)
        )
        self.window.resize(sum(places))
        return [*found]

    def _on_event(self, event: Any) -> None:
        _, message = event
        action = message.get("action") if isinstance(message, dict) else None
        if action in ("add-worker", "remove-worker"):
            self._changed.set()
        if action == "add-worker":
            self._gone.pop(message["worker"], None)
        if action == "remove-worker":
            self._lost = True
            self._gone.setdefault(message["worker"], asyncio.Event()).set()
            for name in ("processing-tasks", "lost-computed-tasks"):
                for key in self._watched.keys() & set(message.get(name, ())):
                    self.start(self._give_up(key, message["worker"]))

    async def _give_up(self, key: str, worker: str) -> None:
        """Stop waiting for a task that a lost worker had begun: no other worker may run it."""
        with suppress(OSError):  # the scheduler may be lost, too
            begun = await self.client.scheduler.get_metadata(keys=[key, STARTED_BY], default="")
            lost = self._watched.get(key)
            if begun == worker and lost is not None and not lost.done():
                lost.set_result(worker)


class DaskMapCall(MapCall[T, R]):
    """A call of `map()` on Dask workers. A single worker task of `MapCall` submits all the jobs.

    Args:
        request: The request for each attempt, without `key` and `item`.
    """

    def __init__(
        self,
        workers: Workers,
        request: JobRequest,
        items: Iterable[T] | AsyncIterable[T],
        retries: int,
    ) -> None:
        super().__init__(items, retries)
        self._dask = workers
        self._request = request
        self._abandoned = False  # whether a task was released before it was done

    async def _work(self) -> None:
        """Submit a job for each item, as many at once as the workers can run."""
        doing: set[asyncio.Task[None]] = set()
        broken: Exception | None = None

        def finish(task: asyncio.Task[None]) -> None:
            self._dask.window.leave()
            if take_exception(task) is None:
                doing.discard(task)

        try:
            while True:
                try:
                    numbered = await self._next(self._dask.window.size)
                except Exception as error:
                    if self._on_error == "raise":
                        raise
                    broken = error  # first wait for the jobs that have started
                    break
                if numbered is None:
                    break
                await self._dask.window.enter()
                task = asyncio.ensure_future(self._do(*numbered))
                doing.add(task)
                task.add_done_callback(finish)
            if doing:
                await asyncio.wait(doing)
            for task in doing:  # these tasks raised an error instead of queueing an outcome
                task.result()
            if broken is not None:
                raise broken
        finally:
            await settle(self._abandon(doing))

    async def _abandon(self, doing: set[asyncio.Task[None]]) -> None:
        """Cancel the jobs that are not done, and wait until their VMs are deleted."""
        for task in list(doing):
            task.cancel()
        if doing:
            await asyncio.wait(doing)
        if self._abandoned:
            await self._dask.everywhere(end_call, self._request.call)

    async def _do(self, index: int, item: T) -> None:
        """Run the job of one item, with retries."""
        for attempt in range(1, self._retries + 2):
            vm_id = ""
            again = attempt <= self._retries
            try:
                reply = await self._try(f"{self._request.call}-{index}-{attempt}", dumps(item))
                vm_id = reply.vm_id
                again = again and reply.value is None  # a retry cannot make a value loadable
                outcome: Outcome[R] = Outcome(index, _value(reply), None)
            except Exception as error:
                if again and not isinstance(error, WorkerLostError):
                    continue
                failure = job_failure(index, item, vm_id, attempt, error)
                outcome = Outcome(index, None, failure)
            self._queue(outcome)
            return

    async def _try(self, key: str, item: bytes) -> JobReply:
        """Submit the job once; if its worker is lost, Dask gives the task to another worker."""
        request = replace(self._request, key=key, item=item)
        lost = self._dask.watch_task(key)
        future = self._dask.client.submit(
            perform, request, key=key, resources={RESOURCE: self._dask.need}, pure=False
        )
        getting = self._dask.start(_result(future))
        either: list[asyncio.Future[Any]] = [getting, lost]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                raise _lost(lost.result())
            return getting.result()
        finally:
            lost.cancel()
            if future.status == "finished" and not getting.done():
                # Dask fetches the results of several tasks together: cancelling one cancels all.
                getting.add_done_callback(lambda _: future.release())
            else:
                self._abandoned |= not getting.done()
                future.release()  # Dask cancels the task if it is not done; then `getting` ends


async def _result(future: Any) -> JobReply:
    try:
        reply = await future
    except KilledWorker as error:
        raise WorkerLostError(f"every Dask worker that ran this job died: {error}") from error
    except FutureCancelledError as error:
        raise WorkerLostError(f"the Dask scheduler cancelled the job: {error.reason}.") from error
    assert isinstance(reply, JobReply)
    if reply.lost:
        raise _lost(reply.lost)
    return reply


def _lost(worker: str) -> WorkerLostError:
    return WorkerLostError(
        f"the Dask worker {worker} was lost during this job; the job may have run partly.",
        hint="Pass rerun=True if another worker may run such a job again.",
    )


def _value(reply: JobReply) -> Any:
    if reply.value is None:
        error = unpack(reply.errors)
        if not isinstance(error, Exception):
            raise RemoteError(told(error)) from error
        raise error
    return loads(reply.value)
