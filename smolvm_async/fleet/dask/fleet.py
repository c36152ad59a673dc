"""`DaskFleet`: many VMs on the workers of a Dask cluster."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

from smolvm_async.config.checks import shown
from smolvm_async.config.options import VMOptions
from smolvm_async.errors import ConfigError, HostError
from smolvm_async.fleet.jobs import (
    MAX_COUNT,
    Job,
    OnError,
    R,
    T,
    check_count,
    check_on_error,
    check_work,
)
from smolvm_async.fleet.member import check_until
from smolvm_async.fleet.template import configure
from smolvm_async.foundation.fork import this_process
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import check_loop, running_loop, settle
from smolvm_async.host.accelerator import TCG
from smolvm_async.qemu.events import BootState

if TYPE_CHECKING:
    from distributed import Client

    from smolvm_async.fleet.dask.client import DaskMapCall, Workers

logger = get_logger(__name__)

NAME = "this DaskFleet"  # in messages


class DaskFleet:
    """A group of VMs on many hosts: `map()` works as in `Fleet`, but on Dask workers.

    ::

        async with DaskFleet("tcp://scheduler:8786", {"memory": 512}) as fleet:
            async for result in fleet.map(job, items):
                ...

    Each job gets a new VM, on the worker that runs the job. Install the same version of
    `smolvm-async[dask]` on the scheduler, the workers and the client.

    A worker's threads (`--nthreads`) and memory limit how many jobs it runs at once. The memory is
    the resource `smolvm_memory`, in MiB; a VM needs its `memory` plus 128 or more. A worker
    started without `--resources smolvm_memory=` offers the available memory of its host, or its
    `--memory-limit` if that is less. Several workers on one host need one of these options.

    Args:
        scheduler: The scheduler's address, or a connected `distributed.Client`. The fleet opens
            its own connection.
        template: The arguments of `AsyncSmolVM` for each VM. Paths are paths on the workers' hosts;
            if a file is missing there, the job fails.
        until: The boot state that a VM must reach before its job starts.
        max_live: The maximum number of VMs that run at once, on all workers together.
        from_snapshot: The name of a snapshot that all VMs are clones of; see `Fleet`. Each worker
            finds the snapshot in its own data directory. On a worker without it, the job fails.
        on_error: See `map()`.

    Raises:
        ConfigError: An argument is wrong.
        HostError: `distributed` is not installed. On entering: no scheduler answers at this
            address (Dask tries for 30 s, or for its `comm.timeouts.connect`), the scheduler or a
            worker has another version of smolvm-async, no worker is large enough for a VM, or no
            worker has the snapshot.
    """

    def __init__(
        self,
        scheduler: Client | str,
        template: VMOptions | None = None,
        *,
        until: BootState | str = BootState.READY,
        max_live: int | None = None,
        from_snapshot: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise HostError(
                f"DaskFleet needs Dask ({error}).",
                hint="pip install 'smolvm-async[dask]'",
                missing=("distributed",),
            ) from error
        if not isinstance(scheduler, str | Client):
            raise ConfigError(
                f"scheduler={shown(scheduler)} is wrong: pass the scheduler's address, such as "
                "'tcp://127.0.0.1:8786', or a distributed.Client."
            )
        self._scheduler = scheduler
        memory = configure(template, from_snapshot).memory
        self._from_snapshot = from_snapshot
        if not memory:
            raise ConfigError(
                "template= needs memory for an s3:// image: the scheduler chooses a worker by the "
                "VM's memory, before the image's manifest is read."
            )
        self._memory = memory  # MiB; the workers know the memory of a snapshot's VM
        self._template = dict(template or {})
        self._until = check_until(until)
        # Without max_live=, the workers' memory and threads are the limit.
        self._most = MAX_COUNT if max_live is None else check_count("max_live", max_live)
        self._on_error = check_on_error(on_error)
        self._process = this_process()
        self._id = uuid.uuid4().hex
        self._calls: WeakSet[DaskMapCall[Any, Any]] = WeakSet()
        self._need: int  # MiB
        self._workers: Workers | None = None
        self._loop: asyncio.AbstractEventLoop
        self._pickled = b""
        self._over = False

    async def __aenter__(self) -> Self:
        from smolvm_async.fleet.dask.messages import dumps

        self._check_process()
        if self._workers is not None or self._over:
            raise ConfigError("a DaskFleet can be entered only once: make a new DaskFleet.")
        self._loop = running_loop()
        self._pickled = dumps(self._template)
        client = await self._connect()
        workers = await self._find_workers(client)
        try:
            await workers.begin()
            self._check_room(workers)
        except BaseException:
            await settle(self._end(workers))
            raise
        self._workers = workers
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._process.is_this:  # only the parent ends the jobs
            return
        check_loop(self._loop, NAME)
        workers, self._workers, self._over = self._workers, None, True
        assert workers is not None
        await settle(self._end(workers))

    def map(
        self,
        job: Job[T, R],
        items: Iterable[T] | AsyncIterable[T],
        *,
        retries: int = 0,
        rerun: bool = True,
        in_order: bool = False,
        on_error: OnError | None = None,
    ) -> AsyncIterator[R]:
        """Run `await job(vm, item)` for each item, on a worker and a new VM; yield the results.

        The job, the items and the results are pickled. Jobs wait while there are no workers. If you
        stop iterating early, the remaining jobs run until the block ends or you call `aclose()`.
        The block's end, `aclose()`, a failure and a cancellation first delete the workers' VMs.

        Args:
            job: An async function of a VM and an item.
            items: The jobs' inputs, maybe endless. `map()` takes the next item when a worker is
                free and you read the results.
            retries: The maximum number of retries of a failed job.
            rerun: Whether another worker runs the job again if its worker was lost, as often as
                Dask's `allowed-failures` allows. So a job may run twice, or only partly. If false,
                the job fails.
            in_order: Whether to yield results in the order of the items.
            on_error: `"raise"`: the first failure cancels the other jobs. `"collect"`: failures
                are raised after all results. By default the fleet's `on_error`.

        Raises:
            ExceptionGroup: During the iteration: jobs failed. The group has a `JobFailedError` for
                each failed job. Its cause has the worker's traceback as a note, or is a
                `WorkerLostError` if the worker was lost.
            ConfigError: An argument is wrong, or the fleet's block was not entered.
        """
        self._check_process()
        if self._workers is None:
            raise ConfigError("the fleet does not run: use async with DaskFleet(...) as fleet.")
        check_loop(self._loop, NAME)
        check_work(job, items, retries, rerun=rerun, in_order=in_order)
        from smolvm_async.fleet.dask.client import DaskMapCall
        from smolvm_async.fleet.dask.messages import JobRequest, dumps

        try:
            pickled = dumps(job)
        except Exception as error:
            raise ConfigError(
                f"job={shown(job)} cannot be sent to the workers: {error}. Pass a function that "
                "can be pickled, with everything it refers to."
            ) from error
        how = self._on_error if on_error is None else check_on_error(on_error)
        template, call_id = self._pickled, f"smolvm-{uuid.uuid4().hex}"
        request = JobRequest(
            *(self._id, call_id, template, pickled, self._until, rerun),
            from_snapshot=self._from_snapshot,
        )
        call: DaskMapCall[T, R] = DaskMapCall(self._workers, request, items, retries)
        self._calls.add(call)
        return call.results(1, in_order, how)

    def _check_process(self) -> None:
        self._process.check("the DaskFleet", "Make a new DaskFleet in this process.")

    async def _connect(self) -> Any:
        """Open our own connection: the given client may belong to another event loop."""
        from distributed import Client

        from smolvm_async.fleet.dask.client import check_versions
        from smolvm_async.fleet.dask.worker import JobsPlugin

        given: Any = self._scheduler
        address, more = given, {}
        if not isinstance(given, str):
            if given.scheduler is None:
                raise ConfigError(
                    "scheduler= is a client that is not connected: connect the client first."
                )
            address, more = given.scheduler.address, {"security": given.security}
        connecting: Any = Client  # its constructor has no type hints
        client = connecting(address, asynchronous=True, set_as_default=False, **more)
        problem = f"cannot reach a Dask scheduler at {address!r}"
        try:
            await client
            await check_versions(client)
            problem = "a Dask scheduler or worker cannot load smolvm-async[dask]"
            await client.register_plugin(JobsPlugin())
        except BaseException as error:
            await settle(client.close())
            known = isinstance(error, OSError | ValueError | ImportError)
            if known and not isinstance(error, HostError):
                raise HostError(f"{problem}: {error}.") from error
            raise
        return client

    async def _find_workers(self, client: Any) -> Workers:
        from smolvm_async.fleet.dask.client import Workers, find_memory

        memory = self._memory
        if self._from_snapshot is not None:
            try:
                memory = await find_memory(client, self._pickled, self._from_snapshot)
            except BaseException:
                await settle(client.close())
                raise
        self._need = memory + TCG.overhead(memory)  # the workers may have no KVM
        return Workers(client, self._need, self._most)

    def _check_room(self, workers: Workers) -> None:
        if not workers.count:
            logger.warning("there are no Dask workers yet: jobs wait for the first one")
        elif workers.largest < self._need:
            raise HostError(
                f"a VM of {self._need} MiB, QEMU's overhead included, does not fit on any of the "
                f"{workers.count} Dask workers: the largest has {workers.largest} MiB.",
                hint="Pass a smaller memory=, or start workers with a larger --resources "
                "smolvm_memory=.",
                missing=("memory",),
            )

    async def _end(self, workers: Workers) -> None:
        try:
            await asyncio.gather(*(call.end() for call in list(self._calls)))
            await workers.end(self._pickled)
        finally:
            await workers.client.close()
