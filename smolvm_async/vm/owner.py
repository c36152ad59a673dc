"""A VM of this process: its directory and its runs, from the first start to its removal.

Many tasks may call one `AsyncSmolVM` at once, and each call may be cancelled. So a caller never
changes a run itself. Each run has one task, `_run()`. Only this task locks the directory, spawns
the processes, reaps them and unlocks the directory. Callers ask the task to end, with
`VMRun.stop()` or `VMRun.abort()`, and wait for the task (`over`).

These attributes are the state. Few functions write each of them:

- `run` and `over`: the current or last run, and its task. Only `start()` sets them, and only while
  no run is active. So two calls of `start()` start the VM once, and both calls wait.
- `_reading`: the task that makes the plan before the first run; for a published image, it reads the
  manifest. Nothing exists on disk yet, so `stop()` only cancels the task.
- `_stopping`: `stop()` has asked the current run to end. `start()` first waits for the end.
- `_deleted`: `delete()` was called. Final, unless another process has started the kept VM.
- `_directory`: the VM's directory while this process holds its lock. `_run()` sets it (in
  `_write_record`), and unlocks the directory of a kept VM (in `_record_end`). When no run is
  active, `_discard()` removes the directory.
- `_created`: identifies this VM in its directory's record. Another VM may have taken the same id
  since then; this process must neither start nor remove the other VM.

`status` is computed from these attributes, and never stored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from smolvm_async.config.checks import check_timeout
from smolvm_async.config.internet import InternetSettings
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.controls.interface import check_run, running, unprepared, until_over
from smolvm_async.errors import (
    ConfigError,
    HostError,
    LoginError,
    MountError,
    VMAlreadyExistsError,
    VMCrashedError,
    VMExpiredError,
    VMNotFoundError,
    VMNotRunningError,
)
from smolvm_async.foundation.log import current_vm, get_logger
from smolvm_async.foundation.process import own_identity
from smolvm_async.foundation.tasks import (
    end_tasks,
    in_background,
    in_thread,
    running_loop,
    settle,
    take_exception,
)
from smolvm_async.host.identity import this_host
from smolvm_async.qemu.events import EventHub
from smolvm_async.qemu.shutdown import Rung, ShutdownReport
from smolvm_async.state.directory import VMDirectory
from smolvm_async.state.record import Record, expired
from smolvm_async.state.status import Status

if TYPE_CHECKING:  # the first VM or the first start imports them
    from smolvm_async.state.snapshot_record import SnapshotRecord
    from smolvm_async.state.snapshots import NewSnapshot
    from smolvm_async.vm.attach.server import ControlServer
    from smolvm_async.vm.plan import Plan
    from smolvm_async.vm.run import VMRun

logger = get_logger(__name__)


class OwnedVM:
    """A VM that this process owns, or will own after the first start; see the module's docstring.

    Attributes: see `smolvm_async.controls.interface.VM`.
    """

    def __init__(
        self,
        config: VMConfig,
        plan: Plan | Callable[[], Coroutine[Any, Any, Plan]],
        record: Record | None = None,
    ) -> None:
        self.config = config
        self.hub = EventHub()
        self.on_crash: Callable[[], None] = lambda: None
        self.run: VMRun | None = None
        self.over: asyncio.Task[None] | None = None
        self._plan = None if callable(plan) else plan
        self._find_plan = plan if callable(plan) else None
        self._reading: asyncio.Task[Plan] | None = None
        self._created = record.created if record else None
        self._recorded_status = record.status if record else Status.CREATED  # before our first run
        self._directory: VMDirectory | None = None
        self._changing = anyio.Lock()  # the network policy changes once at a time
        self._server: ControlServer | None = None
        self._starters = 0  # waiting calls of start()
        self._stopping = False
        self._deleted = False
        self._removal: asyncio.Task[None] | None = None

    @property
    def status(self) -> Status:
        """The VM's status."""
        if self._deleted:
            return Status.DELETED
        if self._reading is not None:
            return Status.STARTING
        if self.run is None or self.over is None:
            return self._recorded_status
        if not self.over.done():
            if self._stopping:
                return Status.STOPPING
            if not self.run.started.done():
                return Status.STARTING
            return Status.PAUSED if self.run.pauses.active else Status.RUNNING
        return Status.CRASHED if self.run.failure else Status.STOPPED

    @property
    def accelerator(self) -> str:
        """The accelerator that QEMU uses; empty before it is known."""
        return self._plan.accelerator.name if self._plan else ""

    async def planned(self) -> Plan:
        """Return the plan. The first call makes the plan from the image and the host.

        Nothing exists on disk yet, so stop() only has to cancel the task that makes the plan.
        """
        self._check_loop()
        if self._plan is not None:
            return self._plan
        if self._reading is None:
            assert self._find_plan is not None
            self._reading = asyncio.ensure_future(self._find_plan())
            self._reading.add_done_callback(take_exception)  # in case all callers are cancelled
        reading = self._reading
        self._starters += 1
        try:
            await asyncio.wait([reading])
        finally:
            self._starters -= 1
            if not self._starters:
                await self._stop_reading()
        if reading.cancelled():
            raise VMNotRunningError(f"{self.config.vm_id} was stopped while it started.")
        self._plan = reading.result()
        self.config = self._plan.config
        return self._plan

    async def start(self) -> None:
        """See `AsyncSmolVM.start()`."""
        self._check_loop()
        if self._stopping and self.over is not None:
            await until_over(self.over)
        plan = None if self._deleted else await self.planned()
        if plan is None or self._deleted:
            failure = self.run.failure if self.run is not None else None
            if isinstance(failure, VMExpiredError):
                raise failure
            raise VMNotRunningError(f"{self.config.vm_id} was deleted: make a new AsyncSmolVM.")
        if self.run is None or self.over is None or self.over.done():
            from smolvm_async.vm.run import VMRun

            self._stopping = False
            self.run = VMRun(plan, self.hub)
            self.over = asyncio.ensure_future(self._run(plan, self.run))
        over, run = self.over, self.run
        self._starters += 1
        try:
            await asyncio.wait({over, run.started}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if self._starters == 1:  # no other start() waits for this VM
                try:
                    await self._kill()
                finally:
                    await self._discard()
            raise
        finally:
            self._starters -= 1
        if self._stopping:
            await asyncio.wait([over])
            raise VMNotRunningError(f"{self.config.vm_id} was stopped while it started.")
        if not run.started.done():
            await self._discard()
            raise run.failure or VMNotRunningError(
                f"{self.config.vm_id} was stopped while it started."
            )

    def _check_loop(self) -> None:
        """Check that asyncio runs this call, in the event loop of the active run, if any."""
        running_loop()
        for work in (self._reading, self.over):
            check_run(work, self.config.vm_id)

    async def _stop_reading(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None and not reading.done():
            await end_tasks(reading)

    async def stop(self, timeout: float | None) -> ShutdownReport:
        """See `AsyncSmolVM.stop()`."""
        check_timeout(timeout)  # an attached process may have sent it
        self._check_loop()
        await self._stop_reading()
        if self.run is None or self.over is None:
            return ShutdownReport(Rung.NONE)
        if not self.over.done():
            self._stopping = True
            self.run.stop(timeout)
            if self._server is not None:
                self._server.tell_status()
            try:
                await asyncio.wait([self.over])
            except asyncio.CancelledError:
                await self._kill()
                raise
        return self.run.report

    async def pause(self) -> None:
        """See `AsyncSmolVM.pause()`."""
        assert self.run is not None
        self.run.idleness.paused = False  # stay paused
        await self.run.pause()

    async def resume(self) -> str:
        """See `AsyncSmolVM.resume()`. Return the reason if the guest's clock could not be set."""
        assert self.run is not None
        return await self.run.resume()

    async def wake(self) -> None:
        """Note a use of the VM; resume it if it was paused because it was idle."""
        if self.run is not None:
            await self.run.idleness.wake()

    async def set_internet_settings(self, settings: InternetSettings) -> None:
        """See `AsyncSmolVM.set_internet_settings()`."""
        self._check_loop()
        async with self._changing:
            plan = await self.planned()
            if not plan.guarded and settings != plan.config.internet_settings:
                from smolvm_async.qemu.internet.trial import find_problem

                raise find_problem() or HostError("A guest's network could not be guarded.")
            run, over = self.run, self.over
            if run is not None and over is not None:
                await asyncio.wait({over, run.started}, return_when=asyncio.FIRST_COMPLETED)
                if not over.done():
                    await run.set_internet_settings(settings)
            config = self.config.model_copy(update={"internet_settings": settings})
            if config.keep and self._created is not None and self._directory is None:
                await self._rewrite(config)
            self.config, self._plan = config, plan._replace(config=config)
        if self._server is not None:
            self._server.tell_status()

    async def _rewrite(self, config: VMConfig) -> None:
        """Change the configuration in the record of a kept VM that is at rest."""
        directory = VMDirectory(config.data_dir, config.vm_id)
        await directory.hold(create=False)
        try:
            record = directory.record
            self._check_not_taken(record)
            assert record is not None
            update = record.model_copy(update={"config": config})
            await in_thread(directory.write, update)
        finally:
            await in_thread(directory.release)

    async def snapshot(self, name: str, labels: dict[str, str]) -> dict[str, Any]:
        """See `AsyncSmolVM.snapshot()`."""
        from smolvm_async.state.snapshots import SNAPSHOTS, new_snapshot

        self._check_loop()
        async with new_snapshot(self.config.data_dir / SNAPSHOTS, name) as new:
            info = await in_background(new.finish, await self.save(new, labels))
            return info._asdict()

    async def save(self, new: NewSnapshot, labels: Mapping[str, str]) -> SnapshotRecord:
        """Fill a new snapshot with the VM, and return the record to finish with."""
        run = self.run
        if run is not None and self.over is not None and not self.over.done():
            running(self)  # and not starting
            return await run.snapshot(new, labels)
        return await self._snapshot_at_rest(new, labels)

    async def _snapshot_at_rest(
        self, new: NewSnapshot, labels: Mapping[str, str]
    ) -> SnapshotRecord:
        from smolvm_async.vm.snapshot import save_at_rest

        plan = await self.planned()
        directory = VMDirectory(self.config.data_dir, self.config.vm_id)
        if self._created is None or self._deleted or not self.config.keep:
            raise VMNotRunningError(
                f"{self.config.vm_id} does not run: start() it, or take the snapshot of a kept VM "
                "(keep=True) that has run."
            )
        await directory.hold(create=False)
        try:
            self._check_not_taken(directory.record)
            return await save_at_rest(plan, directory, new, labels)
        finally:
            await in_thread(directory.release)

    async def delete(self) -> None:
        """See `AsyncSmolVM.delete()`."""
        self._check_loop()
        self._deleted = True
        self.hub.close()
        try:
            await self._kill()
        finally:
            try:
                await self._remove()
            except VMAlreadyExistsError:  # another process has started the kept VM
                self._deleted = False
                raise

    async def leave(self, *, graceful: bool) -> None:
        """End the VM, even if this call is cancelled. Then delete the VM unless it is a kept VM.

        With `graceful`, first power the guest down; a cancellation skips this step.
        """
        try:
            if graceful:
                await self.stop(None)
        finally:
            await (self._kill() if self.config.keep else self.delete())

    async def detach(self) -> None:
        """Raise `ConfigError`: this process owns the VM."""
        raise ConfigError(
            f"{self.config.vm_id} belongs to this process: detach() is only for a running VM that "
            "from_id() attached to. To keep a VM after its block, pass keep=True."
        )

    async def _run(self, plan: Plan, run: VMRun) -> None:
        """Run the VM once, from locking its directory to reaping its last process."""
        current_vm.set(self.config.vm_id)
        server: ControlServer | None = None
        try:
            from smolvm_async.vm.attach.server import ControlServer  # it may find no descriptor

            server = ControlServer(self, run)
            directory = await self._take_directory()
            await server.start(directory.fd)
            self._server = server
            await run.run(directory)
        except Exception as error:
            if isinstance(error, OSError):
                error = unprepared(self.config, error)
            run.failure = run.failure or error  # start() raises this error
        except asyncio.CancelledError:  # the event loop is closing: nobody will call delete()
            await self._record_end(run)
            await self._discard()
            raise
        finally:
            run.launch.end()
            self._server = None
            self.hub.close()
            if isinstance(run.failure, VMCrashedError | LoginError | MountError):
                self.on_crash()
            self._deleted = self._deleted or isinstance(run.failure, VMExpiredError)
            try:
                await self._record_end(run)
            finally:
                if server is not None:
                    await server.close()
        if isinstance(run.failure, VMExpiredError):  # nobody need call delete()
            with suppress(ConfigError):  # list() and prune() try again
                await self._discard()

    async def _take_directory(self) -> VMDirectory:
        """Lock the directory, check that the VM may start, and write the VM's record."""
        directory = self._directory
        if directory is None:
            directory = VMDirectory(self.config.data_dir, self.config.vm_id)
            await directory.hold(create=self._created is None)
        from smolvm_async.vm.limits import admit

        try:
            self._check_not_taken(directory.record)
            await admit(self.config, partial(self._write_record, directory))
        except BaseException:
            if self._directory is None:
                with suppress(OSError):
                    directory.abandon()
            raise
        return directory

    def _check_not_taken(self, found: Record | None) -> None:
        """Check that the directory is empty, or holds this VM or a VM that is not kept.

        Raises:
            VMNotFoundError: This VM was deleted.
            VMExpiredError: The time of this VM is over.
            VMAlreadyExistsError: The directory holds another VM, which is kept.
        """
        vm_id = self.config.vm_id
        same = found is not None and found.created == self._created
        if self._created is not None and not same:
            raise VMNotFoundError(f"{vm_id} has been deleted: make a new AsyncSmolVM.")
        if found is not None and found.expired:
            if same:
                raise expired(found.config)
            return
        if found is not None and found.config.keep and not same:
            raise VMAlreadyExistsError(
                f"vm_id={vm_id!r} is the id of a kept VM: start the kept VM with "
                "AsyncSmolVM.from_id(), delete() it, or choose another id."
            )

    def _write_record(self, directory: VMDirectory) -> None:
        kept = directory.record if self._created is not None else None
        machine = kept.machine if kept else None
        created = self._created or time.time_ns()
        record = Record(config=self.config, created=created, machine=machine)
        directory.write(owned(record))
        self._created, self._directory = created, directory
        if machine is None:
            directory.clear()
        else:
            directory.remove_sockets()

    async def _record_end(self, run: VMRun) -> None:
        """Record the end of a run. Unlock the directory of a kept VM that ran at least once."""
        directory = self._directory
        if directory is None or directory.record is None:
            return
        directory.remove_sockets()
        status = Status.CRASHED if isinstance(run.failure, VMCrashedError) else Status.STOPPED
        if self.config.keep and directory.record.machine is not None and not self._deleted:
            self._directory = None
            await in_thread(_give_back, directory, directory.record.at_rest(status))
        else:
            update = {"status": status, "processes": {}}
            await in_thread(_retire, directory, directory.record.model_copy(update=update))

    async def _kill(self) -> None:
        """End a run at once, and reap its processes before returning, even if cancelled."""
        await self._stop_reading()
        if self.run is not None and self.over is not None:
            if not self.over.done():
                self.run.abort()
            await settle(until_over(self.over))

    async def _discard(self) -> None:
        """Remove the directory if it is locked. After a run, a kept VM's directory is unlocked."""
        if self._directory is not None:
            directory, created = self._directory, self._created
            self._directory = self._created = None
            self._removal = asyncio.ensure_future(self._erase(directory, created))
        if self._removal is not None and not self._removal.done():
            await settle(self._removal)

    async def _erase(self, directory: VMDirectory, created: int | None) -> None:
        try:
            await in_thread(_dispose, directory)
        except OSError as error:
            self._created = created  # so that the caller can retry delete()
            raise ConfigError(
                f"Cannot remove {str(directory.path)!r}: {error.strerror}. "
                "Correct this, then call delete() again."
            ) from error

    async def _remove(self) -> None:
        """Remove the directory. For a stopped kept VM, lock the directory first."""
        if self._directory is None and self._created is not None:
            directory = VMDirectory(self.config.data_dir, self.config.vm_id)
            with suppress(VMNotFoundError):
                await directory.hold(create=False)
                if directory.record is not None and directory.record.created == self._created:
                    self._directory = directory
                else:
                    directory.release()  # another VM has taken this id
        await self._discard()


def owned(record: Record) -> Record:
    """Return the record with this process as the VM's owner."""
    return record.model_copy(update={"owner": own_identity(), "host": this_host()})


def _dispose(directory: VMDirectory) -> None:
    """Remove a VM's files. If this process dies halfway, `prune()` removes the rest."""
    record = directory.record
    if record is not None and record.config.keep:
        config = record.config.model_copy(update={"keep": False})
        with suppress(OSError):  # the disk may be full
            directory.write(owned(record.model_copy(update={"config": config})))
    directory.remove()


def _give_back(directory: VMDirectory, record: Record) -> None:
    try:
        directory.write(record)
    except OSError as error:
        logger.warning("cannot write the record (prune() will correct it): %s", error)
    finally:
        directory.release()


def _retire(directory: VMDirectory, record: Record) -> None:
    try:
        directory.clear_secrets()
    except OSError as error:
        logger.warning("the VM's secrets stay on disk until the VM is deleted: %s", error)
    with suppress(OSError):  # the disk may be full; the directory will soon be removed
        directory.write(record)
