"""The public class for many machines: a fleet whose VMs are on Dask workers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

from smolvm_async.config.checks import shown
from smolvm_async.errors import ConfigError, HostError
from smolvm_async.fleet.checks import check_count, check_on_error, check_until, check_work
from smolvm_async.fleet.jobs import Items, Job, OnError, R, T
from smolvm_async.fleet.template import configure
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import settle
from smolvm_async.host.accelerator import TCG
from smolvm_async.qemu.events import BootState

if TYPE_CHECKING:
    from distributed import Client

    from smolvm_async.fleet.dask.client import RemoteJobs, Workers

logger = get_logger(__name__)

MOST = 100_000


class DaskFleet:
    """Many VMs on many machines: `map()` as that of `Fleet`, its jobs done by Dask workers.

    ::

        async with DaskFleet("tcp://scheduler:8786", {"memory": 512}) as fleet:
            async for result in fleet.map(job, items):
                ...

    Each job has a fresh VM, on the worker that does it. `smolvm-async[dask]` is to be installed
    on the scheduler, on the workers and here.

    A worker does as many jobs at once as it has threads (`--nthreads`), and memory for: the
    resource `smolvm_memory`, MiB, of which a VM takes its `memory` and 128 or more. Workers started
    without `--resources smolvm_memory=` get what their host has available, or their
    `--memory-limit` if that is less; several on one host have to share it so.

    Args:
        scheduler: Its address, or a `distributed.Client` that is connected to it. The fleet makes
            a connection of its own.
        template: The arguments of `AsyncSmolVM` for each VM. Paths are the workers': whether they
            are there, only the jobs tell.
        until: The boot state that a VM is handed over at.
        max_live: How many VMs may live at once, on all workers together.
        on_error: See `map()`.

    Raises:
        ConfigError: An argument is wrong.
        HostError: `distributed` is not installed. Entering it: no scheduler is at this address
            (Dask tries for 30 s, unless its `comm.timeouts.connect` says otherwise), or no worker
            is large enough for such a VM.
    """

    def __init__(
        self,
        scheduler: Client | str,
        template: Mapping[str, Any] | None = None,
        *,
        until: BootState | str = BootState.READY,
        max_live: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise HostError(
                f"DaskFleet needs Dask ({error}): pip install 'smolvm-async[dask]'"
            ) from error
        if not isinstance(scheduler, str | Client):
            raise ConfigError(
                f"scheduler={shown(scheduler)} is wrong: pass its address, such as "
                "'tcp://127.0.0.1:8786', or a distributed.Client."
            )
        self._scheduler = scheduler
        memory = configure(template).memory
        if not memory:
            raise ConfigError(
                "template= needs memory for an s3:// image: the scheduler places the VMs by it, "
                "before anybody has read the manifest."
            )
        self._need = memory + TCG.overhead(memory)  # the workers may have no KVM
        self._template = dict(template or {})
        self._until = check_until(until)
        self._most = MOST if max_live is None else check_count("max_live", max_live)
        self._on_error = check_on_error(on_error)
        self._id = uuid.uuid4().hex
        self._calls: WeakSet[RemoteJobs[Any, Any]] = WeakSet()
        self._workers: Workers | None = None
        self._pickled = b""
        self._over = False

    async def __aenter__(self) -> Self:
        from smolvm_async.fleet.dask.client import Workers
        from smolvm_async.fleet.dask.messages import dumps

        if self._workers is not None or self._over:
            raise ConfigError("this DaskFleet was entered before: make a new one.")
        self._pickled = dumps(self._template)
        client = await self._connect()
        workers = Workers(client, self._need, self._most)
        try:
            await workers.begin()
            self._check_room(workers)
        except BaseException:
            await settle(self._leave(workers))
            raise
        self._workers = workers
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        workers, self._workers, self._over = self._workers, None, True
        assert workers is not None
        await settle(self._leave(workers))

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
        """Run `await job(vm, item)` for each item on a worker and a fresh VM; yield the results.

        The job, the items and the results travel pickled. Jobs wait for workers, if there are none.
        Whoever does not iterate to the end leaves the rest to the end of the fleet's block, or
        calls `aclose()`; that, a failure or a cancellation ends the VMs on the workers first.

        Args:
            job: What to do with a VM and an item.
            items: Taken one by one, as the workers have places for them and results are read; they
                may be endless.
            retries: How often a job that has failed is tried again.
            rerun: Whether a job is done again by another worker when its own is lost, as often as
                Dask's `allowed-failures` says. Otherwise it has failed.
            in_order: Whether the results come in the order of the items.
            on_error: By default that of the fleet. `"raise"`: the first failure cancels the rest.
                `"collect"`: it is raised after all the others' results.

        Raises:
            ExceptionGroup: Of the `JobFailedError`s, from the iteration. Their causes carry the
                worker's traceback as a note; that of a lost worker is a `WorkerLostError`.
            ConfigError: An argument is wrong, or the fleet was not entered.
        """
        if self._workers is None:
            raise ConfigError("the fleet does not run: use async with DaskFleet(...) as fleet.")
        check_work(job, items, rerun=rerun, in_order=in_order)
        from smolvm_async.fleet.dask.client import RemoteJobs
        from smolvm_async.fleet.dask.messages import dumps

        try:
            pickled = dumps(job)
        except Exception as error:
            raise ConfigError(
                f"job={shown(job)} cannot be sent to the workers: {error}. Pass a function that "
                "can be pickled, with all that it refers to."
            ) from error
        tries = check_count("retries", retries, least=0)
        how = self._on_error if on_error is None else check_on_error(on_error)
        order = (self._id, self._pickled, self._need, self._until, pickled)
        call: RemoteJobs[T, R] = RemoteJobs(self._workers, *order, Items(items), tries, rerun)
        self._calls.add(call)
        return call.results(1, in_order, how)

    async def _connect(self) -> Any:
        """A client of our own, whatever event loop the given one lives in."""
        from distributed import Client

        from smolvm_async.fleet.dask.worker import Caretaker

        given: Any = self._scheduler
        address, more = given, {}
        if not isinstance(given, str):
            if given.scheduler is None:
                raise ConfigError("scheduler= is a client that is not connected.")
            address, more = given.scheduler.address, {"security": given.security}
        connecting: Any = Client  # its constructor is not typed
        client = connecting(address, asynchronous=True, set_as_default=False, **more)
        problem = f"no Dask scheduler can be reached at {address!r}"
        try:
            await client
            problem = "a Dask scheduler or worker lacks smolvm-async[dask]"
            await client.register_plugin(Caretaker())
        except (OSError, ValueError, ImportError) as error:
            await settle(client.close())
            raise HostError(f"{problem}: {error}.") from error
        except BaseException:
            await settle(client.close())
            raise
        return client

    def _check_room(self, workers: Workers) -> None:
        if not workers.count:
            logger.warning("there are no Dask workers yet: jobs wait until there are")
        elif workers.largest < self._need:
            raise HostError(
                f"a VM of {self._need} MiB, with QEMU's own, fits on none of the {workers.count} "
                f"Dask workers: the largest has {workers.largest} MiB. Pass a smaller "
                "memory=, or start workers with a larger --resources smolvm_memory=."
            )

    async def _leave(self, workers: Workers) -> None:
        try:
            await asyncio.gather(*(call.end() for call in list(self._calls)))
            await workers.end(self._pickled)
        finally:
            await workers.client.close()
