"""On a Dask worker: the thread whose event loop owns the VMs, and the jobs in it.

The loop is not the worker's own, so that a job that blocks stalls no heartbeat. Its thread lives as
long as the worker: the parent-death signal of QEMU follows it.
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

from smolvm_async.fleet.dask.messages import (
    CLAIM,
    RESOURCE,
    JobReply,
    JobRequest,
    dumps,
    loads,
    no_exit,
    pack,
)
from smolvm_async.fleet.jobs import attempt_job, awaited
from smolvm_async.fleet.member import Gate, Member
from smolvm_async.fleet.memory import LEDGER
from smolvm_async.fleet.template import Template
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import settle
from smolvm_async.vm.vm import AsyncSmolVM

logger = get_logger(__name__)

MIB = 1 << 20
UNBOUND = 100_000  # VMs at once: what bounds them is the worker's memory and threads
REMEMBERED = 256  # calls that are over, whose late tasks are not begun
GONE = ("cancelled", "released", "forgotten", "error")  # states of a task that nobody waits for


class Pool:
    """What the jobs of one fleet share on a worker, while there are any."""

    def __init__(self, arguments: Any) -> None:
        self.template = Template(arguments)
        self.gate: Gate
        self._arguments = arguments
        self._looked = asyncio.Lock()
        self._open = False

    async def open(self) -> None:
        """Look at the host, and remove what dead workers left, once."""
        async with self._looked:
            if not self._open:
                await self.template.look()
                most = self.template.most
                live = UNBOUND if most is None else max(1, most)
                self.gate = Gate(live, len(os.sched_getaffinity(0)))
                await AsyncSmolVM.prune(data_dir=self._arguments.get("data_dir"))
                self._open = True


class WorkerJobs:
    """The jobs of one worker.

    Its methods are for the worker's event loop, but for those that say otherwise.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._futures: dict[str, Future[JobReply | None]] = {}
        self._calls: dict[str, str] = {}
        self._over: deque[str] = deque(maxlen=REMEMBERED)
        self._pools: WeakValueDictionary[str, Pool] = WeakValueDictionary()
        self._tasks: dict[str, asyncio.Task[JobReply]] = {}
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, name="smolvm-async jobs", daemon=True)
        self._thread.start()

    async def perform(self, request: JobRequest) -> JobReply:
        """Do a job; when this returns, however it does, its VM is gone.

        Raises:
            Reschedule: It was cancelled, and is to begin anew if somebody still wants it.
        """
        if request.call in self._over:
            return JobReply(errors=[f"the call {request.call} is over."])
        done: Future[JobReply | None] = Future()
        self._futures[request.key], self._calls[request.key] = done, request.call
        self._loop.call_soon_threadsafe(self._begin, request, done)
        try:
            report = await self._ended(request.key, done)
        finally:
            del self._futures[request.key], self._calls[request.key]
        if report is None:
            raise Reschedule
        return report

    def cancel(self, key: str) -> None:
        """Cancel a job, if it is done here."""
        if key in self._futures:
            self._loop.call_soon_threadsafe(self._cancel, key)

    async def end(self, call: str) -> None:
        """Cancel what is left of a call of `map()`, and wait until its VMs are gone."""
        self._over.append(call)
        await self._end(key for key, other in self._calls.items() if other == call)

    async def close(self) -> None:
        """Cancel everything, wait until it is gone, and end the thread."""
        await self._end(self._futures)
        self._closing = True
        with suppress(RuntimeError):  # it is closed already
            self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)

    async def _ended(self, key: str, done: Future[JobReply | None]) -> JobReply | None:
        waiting = asyncio.wrap_future(done)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:  # the worker closes
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

    # In the thread

    def _live(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            while not self._closing:
                try:
                    self._loop.run_forever()
                except (SystemExit, KeyboardInterrupt) as error:  # of a task that a job has made
                    logger.error("a task of a job on %s has raised %r", self._address, error)
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
            pool = self._pools.get(request.fleet)
            if pool is None:
                pool = self._pools[request.fleet] = Pool(loads(request.template))
            await pool.open()
            job, item = loads(request.job), loads(request.item)
            member = Member(pool.template, pool.gate, request.until)
            vm_id = member.vm.vm_id
            try:
                value = await attempt_job(member, _Guarded(job), item)
            finally:
                await member.release()
            return JobReply(vm_id, dumps(value))
        except Exception as error:
            return JobReply(vm_id, errors=pack(error, f"the Dask worker {self._address}"))


class _Guarded:
    """A job that cannot end the worker."""

    def __init__(self, job: Any) -> None:
        self._job = job

    async def __call__(self, vm: AsyncSmolVM, item: Any) -> Any:
        with no_exit("the job"):
            return await awaited(self._job, vm, item)


_worker_jobs: WeakKeyDictionary[Worker, WorkerJobs] = WeakKeyDictionary()


def _jobs_of(worker: Worker) -> WorkerJobs:
    jobs = _worker_jobs.get(worker)
    if jobs is None:
        jobs = _worker_jobs[worker] = WorkerJobs(worker.address)
    return jobs


async def perform(request: JobRequest) -> JobReply:
    """The task that Dask runs."""
    worker = get_worker()
    if not request.rerun:
        begun = await worker.scheduler.get_metadata(keys=[request.key, CLAIM], default="")
        if begun:
            return JobReply(lost=begun)
        await worker.scheduler.set_metadata(keys=[request.key, CLAIM], value=worker.address)
    return await _jobs_of(worker).perform(request)


async def end_call(call: str, dask_worker: Worker) -> None:
    """Have a worker end what is left of a call of `map()`."""
    await _jobs_of(dask_worker).end(call)


async def prune(template: bytes) -> None:
    """Have a worker remove what dead ones of its host left."""
    await AsyncSmolVM.prune(data_dir=loads(template).get("data_dir"))


class Caretaker(WorkerPlugin):
    """Gives a worker its VMs' memory as a resource; ends jobs that nobody waits for any more.

    It may be taken away and given again while jobs are done: they are the worker's, not its own.
    """

    name = "smolvm_async"

    def setup(self, worker: Worker) -> Awaitable[None] | None:
        """Offer the worker's memory, unless it was started with `--resources smolvm_memory=`."""
        self._worker = worker
        return None if RESOURCE in worker.state.total_resources else self._offer(worker)

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        """A task that is cancelled, or whose client is gone, ends."""
        if finish in GONE and (jobs := _worker_jobs.get(self._worker)) is not None:
            jobs.cancel(key)

    def teardown(self, worker: Worker) -> Awaitable[None] | None:
        """The worker closes, in good order."""
        closing = worker.status not in (Status.running, Status.paused, Status.init)
        jobs = _worker_jobs.pop(worker, None) if closing else None
        return jobs.close() if jobs is not None else None

    async def _offer(self, worker: Worker) -> None:
        room = LEDGER.capacity()
        if limit := worker.memory_manager.memory_limit:
            room = min(room, limit // MIB)
        logger.info("%s offers %d MiB for VMs", worker.address, room)
        await worker.set_resources(**{RESOURCE: room})
        if worker.status is Status.running:
            # The scheduler looks for what tasks that wait for a worker can run on when one begins
            # to run, not when it is given resources.
            worker.status = Status.paused
            worker.status = Status.running
