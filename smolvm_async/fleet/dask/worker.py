"""The VMs and jobs of a `DaskFleet` on one Dask worker; needs `distributed`.

A worker has two event loops:

- Dask's loop, in the worker's main thread. It sends heartbeats and runs `perform()` as a task for
  each job. If a job blocked this loop, the worker would send no heartbeats, and the scheduler would
  consider the worker dead.
- Our loop, in a separate thread that runs as long as the worker. It runs the jobs and owns their
  VMs.

`WorkerJobs` connects the loops. `perform()` makes a `concurrent.futures.Future`, starts a task for
the job on our loop by `call_soon_threadsafe`, and waits for the future. Our loop sets the future
when the task ends. A cancellation reaches our loop in the same way. Each attribute of `WorkerJobs`
belongs to one loop: `_futures`, `_calls` and `_over` to Dask's, `_tasks` and `_fleets` to ours.

A job may be done, fail, or be cancelled or released by the scheduler, its client may disconnect, or
the worker may close. In every case `perform()` ends only after the VM is deleted, since Dask then
counts the VM's memory as free.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Awaitable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from distributed import Reschedule, Worker, WorkerPlugin, get_worker
from distributed.core import Status

from smolvm_async.config.options import make_data_dir
from smolvm_async.errors import HostError, SnapshotNotFoundError
from smolvm_async.fleet.dask.messages import (
    RESOURCE,
    STARTED_BY,
    VERSION,
    JobReply,
    JobRequest,
    check_version,
    dumps,
    loads,
    no_exit,
    pack,
)
from smolvm_async.fleet.jobs import MAX_COUNT, Job, R, T, attempt_job, awaited
from smolvm_async.fleet.member import Member, Places
from smolvm_async.fleet.memory import PROMISES
from smolvm_async.fleet.template import Template
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import settle
from smolvm_async.state.snapshots import SNAPSHOTS, held_snapshot
from smolvm_async.vm.vm import AsyncSmolVM

logger = get_logger(__name__)

MIB = 1 << 20
REMEMBERED = 256  # ended calls of map() to remember, so that their late tasks do not start
NOT_WANTED = ("cancelled", "released", "forgotten", "error")  # Dask's states of unwanted tasks


class WorkerFleet:
    """The objects that a fleet's jobs on this worker share while at least one job runs."""

    def __init__(self, arguments: Any, from_snapshot: str | None) -> None:
        self.template = Template(arguments, from_snapshot=from_snapshot)
        self.places: Places
        self._arguments = arguments
        self._opening = asyncio.Lock()
        self._open = False

    async def open(self) -> None:
        """Check the host and remove the VMs that dead workers left; only the first call does."""
        async with self._opening:
            if not self._open:
                await self.template.look()
                most = self.template.most
                live = MAX_COUNT if most is None else max(1, most)
                self.places = Places(live, len(os.sched_getaffinity(0)))
                await AsyncSmolVM.prune(data_dir=self._arguments.get("data_dir"))
                self._open = True


class WorkerJobs:
    """The jobs of one worker, and the thread with their event loop; see the module's docstring.

    Call the public methods from Dask's event loop.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._futures: dict[str, Future[JobReply | None]] = {}
        self._calls: dict[str, str] = {}
        self._over: deque[str] = deque(maxlen=REMEMBERED)
        self._fleets: WeakValueDictionary[str, WorkerFleet] = WeakValueDictionary()
        self._tasks: dict[str, asyncio.Task[JobReply]] = {}
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, name="smolvm-async jobs", daemon=True)
        self._thread.start()

    async def perform(self, request: JobRequest) -> JobReply:
        """Run a job; delete its VM before this returns or raises an exception.

        Raises:
            Reschedule: The job was cancelled; Dask starts it again if a client still wants it.
        """
        if request.call in self._over:
            return JobReply(errors=[f"the map() call {request.call} has ended."])
        done: Future[JobReply | None] = Future()
        self._futures[request.key], self._calls[request.key] = done, request.call
        self._loop.call_soon_threadsafe(self._begin, request, done)
        try:
            reply = await self._ended(request.key, done)
        finally:
            del self._futures[request.key], self._calls[request.key]
        if reply is None:
            raise Reschedule
        return reply

    def cancel(self, key: str) -> None:
        """Cancel the job of a task, if this worker runs it."""
        if key in self._futures:
            self._loop.call_soon_threadsafe(self._cancel, key)

    async def end(self, call: str) -> None:
        """Cancel the jobs of a call of `map()`, and wait until their VMs are deleted."""
        self._over.append(call)
        await self._end(key for key, other in self._calls.items() if other == call)

    async def close(self) -> None:
        """Cancel all jobs, wait until their VMs are deleted, and end the thread."""
        await self._end(self._futures)
        self._closing = True
        with suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)

    async def _ended(self, key: str, done: Future[JobReply | None]) -> JobReply | None:
        waiting = asyncio.wrap_future(done)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:  # the worker is closing
            self.cancel(key)
            await settle(asyncio.wait([waiting]))
            raise

    async def _end(self, keys: Iterable[str]) -> None:
        ending = []
        for key in list(keys):
            self.cancel(key)
            ending.append(asyncio.wrap_future(self._futures[key]))
        if ending:
            await settle(asyncio.wait(ending))

    # Our thread runs the methods below.

    def _live(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            while not self._closing:
                try:
                    self._loop.run_forever()
                except (SystemExit, KeyboardInterrupt) as error:  # of a task that a job made
                    logger.error("a task of a job on %s raised %r", self._address, error)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _begin(self, request: JobRequest, done: Future[JobReply | None]) -> None:
        task = self._loop.create_task(self._do(request), name=request.key)
        self._tasks[request.key] = task

        def finish(task: asyncio.Task[JobReply]) -> None:
            del self._tasks[request.key]
            if task.cancelled():
                done.set_result(None)
            elif (error := task.exception()) is not None:
                done.set_exception(error)
            else:
                done.set_result(task.result())

        task.add_done_callback(finish)

    def _cancel(self, key: str) -> None:
        if (task := self._tasks.get(key)) is not None:
            task.cancel()

    async def _do(self, request: JobRequest) -> JobReply:
        vm_id = ""
        try:
            fleet = self._fleets.get(request.fleet)
            if fleet is None:
                arguments = loads(request.template)
                fleet = WorkerFleet(arguments, request.from_snapshot)
                self._fleets[request.fleet] = fleet
            await fleet.open()
            job, item = loads(request.job), loads(request.item)
            member = Member(fleet.template, fleet.places, request.until)
            vm_id = member.vm.vm_id
            try:
                value = await attempt_job(member, _without_exit(job), item)
            finally:
                await member.delete()
            return JobReply(vm_id, dumps(value))
        except Exception as error:
            return JobReply(vm_id, errors=pack(error, f"the Dask worker {self._address}"))


def _without_exit(job: Job[T, R]) -> Job[T, R]:
    """Wrap the job so that it cannot exit the worker's process."""

    async def guarded(vm: AsyncSmolVM, item: T) -> R:
        with no_exit("the job"):
            return await awaited(job, vm, item)

    return guarded


_worker_jobs: WeakKeyDictionary[Worker, WorkerJobs] = WeakKeyDictionary()


def _jobs_of(worker: Worker) -> WorkerJobs:
    jobs = _worker_jobs.get(worker)
    if jobs is None:
        jobs = _worker_jobs[worker] = WorkerJobs(worker.address)
    return jobs


async def perform(request: JobRequest) -> JobReply:
    """Run a job; Dask runs this function as a task."""
    worker = get_worker()
    try:
        check_version(request.version, VERSION, f"worker {worker.address}")
    except HostError as error:
        return JobReply(errors=pack(error, f"the Dask worker {worker.address}"))
    if not request.rerun:
        begun = await worker.scheduler.get_metadata(keys=[request.key, STARTED_BY], default="")
        if begun:
            return JobReply(lost=begun)
        await worker.scheduler.set_metadata(keys=[request.key, STARTED_BY], value=worker.address)
    return await _jobs_of(worker).perform(request)


async def end_call(call: str, dask_worker: Worker) -> None:
    """Cancel the jobs of a `map()` call on this worker, and wait until their VMs are deleted."""
    await _jobs_of(dask_worker).end(call)


async def prune(template: bytes) -> None:
    """Remove the VMs that dead workers left on this host."""
    await AsyncSmolVM.prune(data_dir=loads(template).get("data_dir"))


async def snapshot_memory(template: bytes, name: str) -> int:
    """Return the memory of the VM of a snapshot on this host, in MiB; 0 if there is none."""
    root = make_data_dir(loads(template).get("data_dir")) / SNAPSHOTS
    try:
        async with held_snapshot(root, name) as held:
            return held.record.config.memory
    except SnapshotNotFoundError:
        return 0


class JobsPlugin(WorkerPlugin):
    """A plugin that offers a worker's memory as a resource, and cancels unwanted jobs.

    You can remove and reinstall the plugin while jobs run: the jobs belong to the worker.
    """

    name = "smolvm_async"

    def setup(self, worker: Worker) -> Awaitable[None] | None:
        """Offer the worker's memory, unless it was started with `--resources smolvm_memory=`."""
        self._worker = worker
        return None if RESOURCE in worker.state.total_resources else self._offer(worker)

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        """Cancel the job of a task that was cancelled or whose client is gone."""
        if finish in NOT_WANTED and (jobs := _worker_jobs.get(self._worker)) is not None:
            jobs.cancel(key)

    def teardown(self, worker: Worker) -> Awaitable[None] | None:
        """Cancel all jobs if the worker is closing."""
        closing = worker.status not in (Status.running, Status.paused, Status.init)
        jobs = _worker_jobs.pop(worker, None) if closing else None
        return jobs.close() if jobs is not None else None

    async def _offer(self, worker: Worker) -> None:
        room = PROMISES.capacity()
        if limit := worker.memory_manager.memory_limit:
            room = min(room, limit // MIB)
        logger.info("%s offers %d MiB for VMs", worker.address, room)
        await worker.set_resources(**{RESOURCE: room})
        if worker.status is Status.running:
            # The scheduler assigns waiting tasks to a worker when the worker's status becomes
            # running, not when the worker gets resources.
            worker.status = Status.paused
            worker.status = Status.running
