"""One run of a VM, from its launch until all its processes are reaped.

One task executes `VMRun.run()`, and owns every process and every background task of the run: all
of them have ended when the call returns or raises. Other tasks only request the end: `stop()`
requests the shutdown ladder, `abort()` requests an immediate end. Both return at once, and the
caller then waits for the task of `run()`.

This task sleeps in `_until_end` until the run may be over: a process has ended, QEMU has reported a
panic or a pause, or a caller has called `stop()`. Then `vm/crash.py` decides whether the run
crashed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import ExitStack, asynccontextmanager, closing, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from anyio.abc import TaskGroup

from smolvm_async.config.internet import InternetSettings
from smolvm_async.config.source import Source
from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.channels import GuestChannel, channel_to
from smolvm_async.controls.clock import GuestClock
from smolvm_async.controls.files.environment import set_variables
from smolvm_async.controls.interface import last_use, unprepared
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.login import Access, ImageLogin, Login
from smolvm_async.errors import (
    CommandError,
    LaunchError,
    LoginError,
    MonitorError,
    MountError,
    SmolVMError,
    SnapshotError,
    VMCrashedError,
    VMNotRunningError,
)
from smolvm_async.foundation.entries import memory_file
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.process import Spawner
from smolvm_async.foundation.tasks import Turns, end_tasks, first_of, in_thread, settle
from smolvm_async.host.memory import own_memory
from smolvm_async.qemu.arguments import MachineSpec, RAMFile
from smolvm_async.qemu.boot import BootTracker
from smolvm_async.qemu.console import Console
from smolvm_async.qemu.disk import Disk
from smolvm_async.qemu.events import (
    BootState,
    Event,
    EventHub,
    GuestPanicked,
    NetworkDenied,
    Reset,
    Shutdown,
    Trouble,
)
from smolvm_async.qemu.launch import SAME_END, Processes, launch
from smolvm_async.qemu.monitor import CommandQueue, Monitor
from smolvm_async.qemu.parked import make_parked
from smolvm_async.qemu.pauses import Pauses
from smolvm_async.qemu.peripherals import Peripherals
from smolvm_async.qemu.shutdown import WAKE, Rung, ShutdownReport, shut_down
from smolvm_async.qemu.traffic import Traffic
from smolvm_async.qemu.troubles import Troubles
from smolvm_async.state.directory import VMDirectory, cannot_use
from smolvm_async.state.record import Machine, expired
from smolvm_async.state.status import Status
from smolvm_async.vm.crash import find_crash
from smolvm_async.vm.idle import Idleness
from smolvm_async.vm.launch_together import Launch
from smolvm_async.vm.limits import oom_kills
from smolvm_async.vm.mounting import Mounting
from smolvm_async.vm.plan import Plan
from smolvm_async.vm.prepare import PreparedVM, SavedMachine, prepare, snapshot_to_start

if TYPE_CHECKING:  # a launch, a snapshot, or a start from one, imports them
    from smolvm_async.qemu.internet.denials import Denied
    from smolvm_async.qemu.internet.service import Internet
    from smolvm_async.qemu.saving import SavedState
    from smolvm_async.state.snapshot_record import SnapshotRecord
    from smolvm_async.state.snapshots import NewSnapshot, Snapshot
    from smolvm_async.vm.set_right import Clone

logger = get_logger(__name__)

NO_ROOM = "The disk is probably full: free some space for the guest's memory in {}."
FULL = ("SIGBUS", os.strerror(errno.ENOSPC))  # signs of a full disk in QEMU's messages
CANNOT_SAVE = (MountError, MonitorError, LaunchError, CommandError, VMNotRunningError)
SAVABLE = ("running", "paused", "postmigrate")  # QEMU's run states in which a snapshot is possible

T = TypeVar("T")

_restores = Turns()


class VMRun:
    """One run of a VM. The owner's task executes `run()`; other tasks ask the run to end.

    Attributes: those of `smolvm_async.controls.interface.Run`, and:
        started: Done when the guest's processors run.
    """

    def __init__(self, plan: Plan, hub: EventHub) -> None:
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pauses = Pauses()
        self.boot = BootTracker(hub, self.pauses, plan.on_progress)
        self.console = Console()
        self.parked = make_parked(plan.config.profile)
        self.failure: Exception | None = None
        self.report = ShutdownReport(Rung.NONE)
        self.launch = Launch()
        if plan.source is not None:  # otherwise the image may have to be built first
            self.launch.begin()
        self._plan = plan
        self._state: VMDirectory
        self._machine: Machine | None = None  # only of a kept VM that has run before
        self._hub = hub
        self.troubles = Troubles(plan.config, self._qemu_log, self._qemu_pid)
        self._monitor = Monitor(self._on_event, self.troubles.explain)
        self._traffic = Traffic(self._monitor)
        self.peripherals = Peripherals.make(self._monitor, self.pauses, plan.config)
        self.link = Link(
            plan.config.vm_id,
            self.ssh_access,
            self.pauses,
            self.troubles.explain,
            final=plan.config.profile.login == "image",
        )
        self.session = Session(self.peripherals.agent, self.pauses, self.troubles.explain)
        self._mounting = Mounting(plan.config, self._monitor, self.link)
        self._internet: Internet | None = None  # if a guard enforces the network policy
        self._spawner: Spawner
        self._prepared: PreparedVM
        self._source: Source | None = plan.source
        self._login: Login | ImageLogin | None = None
        self._clone: Clone | None = None  # if the VM is a clone of a running VM
        self._right_later = False  # a clone of a guest that boots, and is reached through its agent
        self._disk: Disk
        self._saving = anyio.Lock()  # a snapshot excludes pauses and other snapshots
        self._ram: int | None = None  # the file with the RAM of a VM that boots under TCG
        self._works: set[asyncio.Task[Any]] = set()
        self._stopped: Event | None = None  # the last event that a snapshot has caused
        self._resumed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock = GuestClock(
            self.pauses, lambda: self._channel.advance_clock(), self._monitor.start_task
        )
        self._commands = CommandQueue(self._monitor)
        self.idleness = Idleness(
            plan.config, self.boot, self.pauses, self._last_use, self.pause, self.resume
        )
        self._scope = anyio.CancelScope()
        self._news = asyncio.Event()  # set when the run may be over
        self.processes = Processes(self._news.set)
        self._shutdown: Shutdown | None = None
        self._powerdown_timeout: float | None = None
        self._stop = asyncio.Event()
        self._unexplained: Event | None = None  # a STOP: `_until_end` asks QEMU for the reason
        self._crash: str | None = None
        self._oom_kills = oom_kills()

    def stop(self, powerdown_timeout: float | None) -> None:
        """Request the shutdown ladder. Only the first call sets the deadline, in seconds."""
        if not self._stop.is_set():
            self._powerdown_timeout = powerdown_timeout
            self._stop.set()
            self._news.set()

    def abort(self) -> None:
        """Kill every process now. `run()` returns when all processes are reaped."""
        self.report = ShutdownReport(Rung.SIGKILL)
        self.processes.kill()
        self._scope.cancel()

    async def run(self, state: VMDirectory) -> None:
        """Launch the VM in `state`, wait for its end, and reap its processes.

        Store a failure in `failure` instead of raising it.
        """
        self._state = state
        assert state.record is not None
        self._machine = state.record.machine
        try:
            with self._scope:
                async with anyio.create_task_group() as group, self._guarding(), self.processes:
                    await self._run(group)
                    if self.processes.expired or state.record.expired:
                        self.failure = expired(self._plan.config)
                        self.report = replace(self.report, rung=Rung.TTL)
                    group.cancel_scope.cancel()
        except* Exception as errors:
            error = first_of(errors)
            config = self._plan.config
            self.failure = unprepared(config, error) if isinstance(error, OSError) else error
        finally:
            self.boot.end()
            await end_tasks(*self._works)
            self.pauses.close()
            self.link.close()
            try:
                await self._monitor.disconnect()
            finally:
                self._traffic.close()
                self.console.close()
                if self.parked is not None:
                    self.parked.close()
                if self._ram is not None:
                    os.close(self._ram)
                self.peripherals.screen.close()
                await settle(self._close_agent())

    async def _close_agent(self) -> None:
        await self.peripherals.agent.close()
        await self.session.close()

    @asynccontextmanager
    async def _guarding(self) -> AsyncIterator[None]:
        """Enforce the network policy until all processes have ended, if the host can."""
        if not self._plan.guarded:
            with closing(Spawner()) as self._spawner:
                yield
            return
        from smolvm_async.qemu.internet.service import Internet  # `import` does not need it

        config = self._plan.config
        async with Internet(config.internet_settings, self._on_denied) as internet:
            self._internet, self._spawner = internet, internet.spawner
            yield

    async def set_internet_settings(self, settings: InternetSettings) -> None:
        """Change the network policy, and record it."""
        if self._internet is not None:
            await self._internet.change(settings)
        config = self._plan.config.model_copy(update={"internet_settings": settings})
        self._plan = self._plan._replace(config=config)
        await self._record(config=config)

    def _on_denied(self, denied: Denied) -> None:
        event = NetworkDenied(NetworkDenied.NAME, time.time(), denied.data())
        self._hub.publish(event)
        logger.info("%s", event)

    def own_memory(self) -> int:
        """Return the memory of all processes that no other VM shares, in MiB."""
        files = self._ram is not None  # else the RAM is anonymous, or a snapshot's file
        pids = [child.identity.pid for child in self.processes.children]
        return sum(own_memory(pid, files=files) for pid in pids)

    def _last_use(self) -> float:
        return max(last_use(self), self.peripherals.agent.used)

    async def stats(self) -> dict[str, Any]:
        """See `AsyncSmolVM.stats()`. Return the fields of the `VMStats`."""
        from smolvm_async.vm.stats import measure

        identities = [child.identity for child in self.processes.children]
        own = await in_thread(self.own_memory)
        stats = await measure(identities, own, self._monitor, self._traffic, self._state.path)
        return stats._asdict()

    async def guest_status(self) -> str:
        """Return QEMU's run state of the guest; empty if QEMU has ended."""
        with suppress(SmolVMError):
            return str((await self._monitor.execute("query-status"))["status"])
        return ""

    async def pause(self) -> None:
        """Stop the guest's processors."""
        async with self._saving:
            pass
        await self._commands.take(partial(self._run_guest, "stop", Status.PAUSED))

    async def resume(self) -> str:
        """Let the guest's processors run again, and set the guest's clock.

        Return the reason if the clock could not be set.
        """
        async with self._saving:
            status = await self.guest_status()
        await self._commands.take(
            partial(self._run_guest, WAKE.get(status, "cont"), Status.RUNNING)
        )
        if status == "suspended":  # a guest that wakes sets its clock itself
            return ""
        missed = await self._clock.set() if self._has_clock() else ""
        if await self.guest_status() == "io-error":
            message = f"{self._plan.config.vm_id} was resumed, and is paused again."
            raise self.troubles.explain(VMNotRunningError(message))
        return missed

    async def snapshot(self, new: NewSnapshot, labels: Mapping[str, str]) -> SnapshotRecord:
        """Save the running machine into a new snapshot, and return the snapshot's record.

        The work ends with the run. See `AsyncSmolVM.snapshot()` for the errors.
        """
        from smolvm_async.vm.snapshot import RunningMachine, save_running

        vm_id = self._plan.config.vm_id
        async with self._saving:
            status = await self.guest_status()
            if status not in SAVABLE:
                message = f"{vm_id} cannot be saved: its state is {status or 'ended'}."
                raise self.troubles.explain(VMNotRunningError(message))
            machine = RunningMachine(
                self._plan,
                self._prepared,
                self._state,
                self._monitor,
                self._disk,
                self._ram,
                self.boot.last.state is BootState.READY,
                self._record_layers,
                self._read_machine,
            )
            try:
                async with self._mounting.released(machine.ready and status == "running"):
                    record = await self._within_run(save_running(machine, new, labels))
            except (*CANNOT_SAVE, OSError) as error:
                if self.processes.ended or isinstance(error, VMNotRunningError):
                    raise VMNotRunningError(f"{vm_id} has ended during its snapshot.") from error
                root = new.path.parent
                reason = cannot_use(root, error) if isinstance(error, OSError) else error
                message = f"The snapshot of {vm_id} could not be made: {reason.message}"
                # A page of the RAM's file for which the disk has no room is a SIGBUS of the twin.
                full = any(sign in message for sign in FULL) and not isinstance(error, OSError)
                hint = NO_ROOM.format(root) if full else reason.hint
                raise self.troubles.explain(SnapshotError(message, hint=hint)) from error
        if status == "running" and await self.guest_status() not in (status, "") and self._stopped:
            self._on_event(self._stopped)  # it was not the snapshot that has stopped the guest
        return record

    async def _within_run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in a task that ends with its caller and with the run."""
        task = asyncio.ensure_future(work)
        self._works.add(task)
        try:
            await asyncio.wait([task])
            if task.cancelled():
                raise VMNotRunningError(f"{self._plan.config.vm_id} has ended.")
            return task.result()
        finally:
            self._works.discard(task)
            await end_tasks(task)

    async def _record_layers(self) -> None:
        record = self._state.record
        if record is not None and record.machine is not None:
            machine = record.machine._replace(layers=self._disk.layers)
            await in_thread(self._state.write, record.model_copy(update={"machine": machine}))

    @property
    def _channel(self) -> GuestChannel:
        return channel_to(self, self._plan.config.profile)

    def _has_clock(self) -> bool:
        """Return whether the library can set the guest's clock."""
        return self.boot.last.state is BootState.READY

    async def _run_guest(self, command: str, status: Status) -> None:
        await self._monitor.complete(command)
        await self._record(status=status)

    async def _run(self, group: TaskGroup) -> None:
        try:
            await self._launch(group)
        except SmolVMError as error:
            image = self._source.image if self._source else None
            self.failure = await self.processes.explain(error, self._state.path, image)
            return
        through_agent = self._channel.agent is not None
        guess = through_agent and not self._plan.config.env  # only `_probe` sets variables
        group.start_soon(partial(self.boot.watch, self._monitor, self._probe, guess=guess))
        group.start_soon(self.idleness.watch)
        group.start_soon(self._traffic.watch)
        self.started.set_result(None)
        await self._until_end()
        if self.processes.qemu.ended:
            await self._monitor.last_words()
        if not self._scope.cancel_called:  # else the SIGKILL of abort() looks like a crash
            self.failure = self._judge()

    async def _launch(self, group: TaskGroup) -> None:
        """Launch QEMU and its sidecars, and let the guest's processors run."""
        async with snapshot_to_start(self._plan, self._machine) as snapshot:
            turn = _restores.take() if snapshot is not None else nullcontext()
            async with turn:
                await self._launch_from(snapshot)
                await self._let_run(group)

    async def _let_run(self, group: TaskGroup) -> None:
        plan, saved = self._plan, self._prepared.saved
        layers, keep = self._prepared.layers, plan.config.keep
        self._disk = Disk(self._monitor, self._state.path, layers, keep=keep)
        if not keep:  # before guests run and use the processors
            group.start_soon(self._record_running, None)
        if saved is None:
            await self._open_to_host()
            await self.launch.end_with_others()
            await self._monitor.execute("cont")
            self.boot.enter(BootState.FIRMWARE, "QEMU runs the guest's processors (cont)")
        else:
            self.launch.end()
            await self._go_on_from(saved)
        if keep:  # start() needs this record to boot the VM again
            await self._record_running(await self._read_machine())

    def _make_ram(self) -> RAMFile | None:
        """Make the RAM of a VM that boots under TCG: see `qemu/saving.py`."""
        if self._plan.accelerator.name != "tcg":
            return None
        self._ram = memory_file("ram")
        os.ftruncate(self._ram, self._plan.config.memory << 20)
        return RAMFile(self._ram, shared=True)

    async def _launch_from(self, snapshot: Snapshot | None) -> None:
        """Launch QEMU and its sidecars, and load the machine of a snapshot."""
        plan = self._plan
        with ExitStack() as files:
            prepared = await prepare(plan, self._state, self._machine, snapshot, files)
            self._prepared, saved = prepared, prepared.saved
            self._source, self._login = prepared.source, prepared.login
            self.troubles.image = prepared.image.path
            self.launch.begin()
            spec = MachineSpec(
                plan.config,
                prepared.tools,
                plan.accelerator,
                prepared.image.fd,
                plan.config.profile.sidecars,
                disk_format=prepared.source.format,
                machine_type=self._origin.type if self._origin is not None else None,
                direct_boot=prepared.direct_boot,
                layers=prepared.layers,
                ram=RAMFile(saved.ram, shared=False) if saved is not None else self._make_ram(),
                identity=self._origin.identity if self._origin is not None else "",
                incoming=saved is not None,
                shares=prepared.shares,
                isolated=self._internet is None and plan.config.internet_settings.mode == "off",
            )
            await launch(
                self.processes,
                spec,
                self._state.path,
                self._monitor,
                self.console,
                self.peripherals.screen,
                self.parked,
                self.peripherals.agent if "agent" in plan.config.profile.channels else None,
                timeout=plan.config.timeouts.launch,
                amend=lambda argv: [*plan.prefix, *argv],
                spawner=self._spawner,
            )
            record = self._state.record
            if record is not None and (left := record.seconds_left) is not None:
                if left <= 0:
                    raise expired(plan.config)
                await self.processes.end_after(left, self._state.path, self._spawner)
            if saved is not None:
                await self._load(saved.state)

    async def _load(self, state: SavedState) -> None:
        """Load a saved machine, and let its guest go on."""
        deadline = self._plan.config.timeouts.launch
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                await state.load(self._monitor, self._resumed)
                waited: set[asyncio.Future[Any]] = {self._resumed, self.processes.qemu.exited}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not self._resumed.done():
            raise LaunchError(f"QEMU did not load the saved machine within {deadline:g} s")

    @property
    def _origin(self) -> Machine | None:
        """The machine that this machine must equal, if it does not start from an image."""
        return self._machine or self._prepared.origin

    async def _go_on_from(self, saved: SavedMachine) -> None:
        """Set a guest that goes on right before anybody uses it."""
        record = saved.record
        source = record.config.vm_id if self._plan.snapshot else "a ready guest"  # of the cache
        evidence = f"restored from a snapshot of {source}"
        state = BootState.OPERATING_SYSTEM if record.ready else BootState.FIRMWARE
        self.boot.enter(state, evidence)  # `watch` notices the operating system of a booting guest
        await self._open_to_host()  # not before: QEMU answers slowly while it loads
        if saved.login is not None:
            await self._set_right(record, saved.login)
        elif record.ready:
            await self._set_right_without_keys()
        else:
            self._right_later = True
        # `_probe` sets variables and mounts directories, before the guest is ready.
        if record.ready and not self._plan.config.env and not self._mounting.mounts:
            self.boot.enter(BootState.READY, evidence)

    async def _set_right_without_keys(self) -> None:
        from smolvm_async.vm.set_right import NOT_REACHED, set_right_through_agent

        config = self._plan.config
        if self._channel.agent is not None:
            await self.guest_status()  # before its answer, QEMU tells whether the port is open
            await set_right_through_agent(config.vm_id, self.session, config.profile.name)
        else:  # Windows, over SSH
            logger.warning(NOT_REACHED)
            self._clock.set_soon()

    async def _set_right(self, record: SnapshotRecord, before: Login) -> None:
        """Set the clone right; if its guest was not ready yet, as soon as it is."""
        from smolvm_async.vm.set_right import Clone

        assert isinstance(self._login, Login)
        config = self._plan.config
        self._clone = clone = Clone(config.vm_id, self.link, self.parked, before, self._login)
        if record.ready:
            self.link.serving = True
            await clone.set_right(config.timeouts.boot)  # a busy guest may take long
        elif self.parked is not None:  # the process may not run yet, and reads the message later
            self._monitor.start_task(clone.set_right(config.timeouts.boot))

    async def _open_to_host(self) -> None:
        """Plug the host's directories in, and open VNC and the forwarded ports."""
        config = self._plan.config
        await self._mounting.plug()
        if config.vnc is not None:
            await self.peripherals.vnc.start(config.vnc)
        if self._login is not None:
            await self.peripherals.ports.ssh()
        for forward in config.port_forwards:
            await self.peripherals.ports.expose(*forward)

    async def ssh_access(self) -> Access:
        """Return the port, the user and the keys to log in to the guest."""
        login = self._clone.login if self._clone is not None else self._login
        assert login is not None
        return login.access(await self.peripherals.ports.ssh())

    async def _probe(self) -> str | None:
        """Reach the guest and set the VM's variables; return the evidence that it is ready."""
        try:
            evidence = await self._channel.probe()
            if evidence is None:
                return None
            if isinstance(self._login, ImageLogin) and not self._login.host_key:
                key, directory = self.link.host_key, self._state.path
                self._login = await in_thread(self._login.remember, key, directory)
            if self._clone is not None and self.parked is None and not self._clone.is_right:
                await self._clone.set_right(self._plan.config.timeouts.boot)
            if self._right_later:
                await self._set_right_without_keys()
                self._right_later = False
            if env := self._plan.config.env:
                async with self._channel.files() as guest:
                    await set_variables(guest, env)
            await self._mounting.mount()
            await self._clock.set_if_late()
        except (LoginError, MountError):  # another try would not help
            raise
        except SmolVMError as error:
            logger.warning("the guest is not ready yet: %s", error)
            return None
        return evidence

    async def _read_machine(self) -> Machine:
        where = {"path": "/machine", "property": "type"}
        name = str(await self._monitor.execute("qom-get", where)).removesuffix("-machine")
        image, layers = self._prepared.image, self._disk.layers
        identity = self._origin.identity if self._origin is not None else ""
        return Machine(name, image.size, image.mtime_ns, self._source, identity, layers)

    async def _record_running(self, machine: Machine | None) -> None:
        processes = {child.name: child.identity for child in self.processes.children}
        await self._record(status=Status.RUNNING, processes=processes, machine=machine)

    async def _record(self, **update: object) -> None:
        """Update the record. A full disk must not end a VM that is not kept, so log the error."""
        record = self._state.record
        assert record is not None
        try:
            await in_thread(self._state.write, record.model_copy(update=update))
        except OSError as error:
            if self._plan.config.keep and record.machine is None:
                raise
            logger.warning("cannot write the record: %s", error)

    async def _until_end(self) -> None:
        """Wait until a process has ended, the guest has crashed, or the ladder has ended QEMU."""
        qemu, ended = self.processes.qemu, self.processes.ended
        while not (ended or self._crash or self._stop.is_set()):
            self._news.clear()
            await self._news.wait()
            if self._unexplained is not None:
                event, self._unexplained = self._unexplained, None
                await self._explain_pause(event)
        if self._crash:
            return
        if ended:
            if ended[0] is not qemu and not ended[0].returncode:
                await asyncio.wait([qemu.exited], timeout=SAME_END)
            self.report = ShutdownReport(Rung.GUEST, exit_status=qemu.returncode)
            return
        timeouts = self._plan.config.timeouts
        if self._powerdown_timeout is not None:
            timeouts = timeouts.model_copy(update={"powerdown": self._powerdown_timeout})
        await self.idleness.end()  # a paused guest does not power down
        await self._record(status=Status.STOPPING)
        if self._plan.config.keep:  # else the guest's disk goes
            await self.session.finish()
        self.report = await shut_down(qemu, self._monitor, timeouts, self._plan.on_progress)

    def _on_event(self, event: Event) -> None:
        if event.name == "RESUME" and not self._resumed.done():
            self._resumed.set_result(None)
        if self._saving.locked() and event.name in ("STOP", "RESUME"):
            self._stopped = event  # a snapshot lets the guest stand still for a moment
            return
        if event.name == "MIGRATION":  # the library loads the machine
            return
        self._hub.publish(event)
        self._warn(self.troubles.on_event(event))
        self.boot.on_event(event)
        self.peripherals.agent.on_event(event)
        self.session.on_event(event)
        if event.name == "RESUME" and self.pauses.active and not self._stop.is_set():
            if self._has_clock():
                self._clock.set_soon()  # before the event lets the waiting commands go on
            else:
                self._clock.late = True
        if self._shutdown is None:
            self.pauses.on_event(event)
        if isinstance(event, Shutdown):
            self._shutdown = event
        elif isinstance(event, GuestPanicked):
            self._give_up("the guest panicked (GUEST_PANICKED)")
        elif isinstance(event, Reset):
            self.link.abort()  # the guest has lost the connection; no error would show this
            self.link.serving = False
            self._clock.late = False  # the guest reads the hardware clock when it boots
        elif event.name == "STOP" and self._shutdown is None:
            self._unexplained = event
            self._news.set()

    async def _explain_pause(self, event: Event) -> None:
        status = await self.guest_status()
        if status == "internal-error":
            self._give_up(f"the accelerator cannot run the guest any further (status {status})")
        self._warn(await in_thread(self.troubles.stopped, event, status))

    def _warn(self, trouble: Trouble | None) -> None:
        """Publish a new trouble of the VM, and log it."""
        if trouble is not None:
            self._hub.publish(trouble)
            logger.warning("%s", trouble)

    def _qemu_log(self) -> str:
        return self.processes.qemu.log.quote() if self.processes.children else ""

    def _qemu_pid(self) -> int | None:
        return self.processes.qemu.identity.pid if self.processes.children else None

    def _give_up(self, reason: str) -> None:
        self._crash = self._crash or reason
        self._news.set()

    def _judge(self) -> VMCrashedError | None:
        """Return an error if the run crashed: see `vm/crash.py`."""
        crash = find_crash(
            self.processes, self._crash, self._shutdown, self.report.rung, self._oom_kills
        )
        if crash is None:
            return None
        self.console.drain()
        self.report = replace(self.report, rung=Rung.CRASH)
        return self.troubles.explain(crash.to_error(self._plan.config.vm_id, self.console))
