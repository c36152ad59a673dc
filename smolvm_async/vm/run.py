"""One run of a VM: every process of it, in one task group, from launch until all are reaped."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

import anyio
from anyio.abc import TaskGroup, TaskStatus

from smolvm_async.config.source import Source
from smolvm_async.controls.interface import console_tail, unprepared
from smolvm_async.controls.ssh.access import Access
from smolvm_async.controls.ssh.environment import Environment
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.login import Login
from smolvm_async.errors import LaunchError, SmolVMError, VMCrashedError, VMNotRunningError
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.process import Child, spawn
from smolvm_async.foundation.tasks import first_of, in_thread
from smolvm_async.host.memory import resident
from smolvm_async.images.local import BaseImage
from smolvm_async.qemu.arguments import Descriptors, qemu_arguments
from smolvm_async.qemu.boot import BootTracker
from smolvm_async.qemu.console import Console
from smolvm_async.qemu.events import BootState, Event, EventHub, GuestPanicked, Reset, Shutdown
from smolvm_async.qemu.monitor import CommandQueue, Monitor
from smolvm_async.qemu.peripherals import Peripherals
from smolvm_async.qemu.shutdown import Rung, ShutdownReport, shut_down
from smolvm_async.qemu.sidecars import SIDECARS
from smolvm_async.state.directory import QEMU_LOG, VMDirectory
from smolvm_async.state.record import Machine, Status
from smolvm_async.vm.launch_together import Launch
from smolvm_async.vm.limits import oom_hint, oom_kills
from smolvm_async.vm.plan import Plan
from smolvm_async.vm.prepare import PreparedVM, prepare

logger = get_logger(__name__)

SAME_END = 0.5  # seconds within which a sidecar that ended well and QEMU ended together
IMAGE_IN_USE = 'Failed to get shared "write" lock'  # QEMU's words for it


class VMRun:
    """Owns the processes of one run. One task executes `run()`; others ask it to end.

    Attributes:
        started: Done when the guest's processors run.
        boot: The boot states.
        console: The serial console.
        peripherals: Screen, input devices, VNC server and ports.
        link: The SSH connection to the guest.
        paused: Whether the guest's processors stand still.
        failure: Why the run could not begin, or how it crashed; `None` if all went well.
        report: How it ended.
    """

    def __init__(self, plan: Plan, hub: EventHub) -> None:
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.boot = BootTracker(hub, plan.on_progress)
        self.console = Console()
        self.failure: Exception | None = None
        self.report = ShutdownReport(Rung.NONE)
        self.launch = Launch(under_way=plan.source is not None)  # or it may have to be built first
        self._plan = plan
        self._state: VMDirectory
        self._machine: Machine | None = None  # of a kept VM that has run before
        self._hub = hub
        self._monitor = Monitor(self._on_event)
        self.peripherals = Peripherals.make(self._monitor, plan.config)
        self.link = Link(plan.config.vm_id, self.ssh_access)
        self.paused = False
        self._source: Source | None = plan.source
        self._login: Login | None = None
        self._turns = CommandQueue(self._monitor)
        self._scope = anyio.CancelScope()
        self._children: list[Child] = []
        self._ended: list[Child] = []  # in the order in which they ended
        self._shutdown: Shutdown | None = None
        self._powerdown_timeout: float | None = None
        self._stop = asyncio.Event()
        self._news = asyncio.Event()  # something that may be the end
        self._why_paused = False  # is to be looked at
        self._crash: str | None = None
        self._oom_kills = oom_kills()

    def stop(self, powerdown_timeout: float | None) -> None:
        """Ask for the shutdown ladder; the first caller's deadline (seconds) counts."""
        if not self._stop.is_set():
            self._powerdown_timeout = powerdown_timeout
            self._stop.set()
            self._news.set()

    def abort(self) -> None:
        """Kill every process now; `run()` returns when they are reaped."""
        self.report = ShutdownReport(Rung.SIGKILL)
        self._kill()
        self._scope.cancel()

    async def run(self, state: VMDirectory) -> None:
        """Launch, hold and end the VM in `state`. Failures are kept in `failure`, never raised."""
        self._state = state
        assert state.record is not None
        self._machine = state.record.machine
        try:
            with self._scope:
                async with anyio.create_task_group() as group:
                    await self._run(group)
                    group.cancel_scope.cancel()
        except* Exception as errors:
            self.failure = first_of(errors)
        finally:
            self.boot.end()
            self.peripherals.input.close()
            self.link.close()
            try:
                await self._monitor.disconnect()
            finally:
                self.console.close()
                self.peripherals.screen.close()

    def resident(self) -> int:
        """MiB of its processes that are in memory."""
        return sum(resident(child.identity.pid) for child in self._children)

    async def guest_status(self) -> str:
        """QEMU's run state of the guest; empty if QEMU has ended."""
        with suppress(SmolVMError):
            return str((await self._monitor.execute("query-status"))["status"])
        return ""

    async def pause(self) -> None:
        """Stop the guest's processors."""
        await self._turns.take(partial(self._run_guest, "stop", Status.PAUSED))

    async def resume(self) -> None:
        """Let them run again."""
        await self._turns.take(partial(self._run_guest, "cont", Status.RUNNING))

    async def _run_guest(self, command: str, status: Status) -> None:
        await self._monitor.complete(command)
        await self._record(status=status)

    async def _run(self, group: TaskGroup) -> None:
        try:
            qemu = await self._launch(group)
        except (SmolVMError, OSError) as error:
            self.failure = await self._launch_error(error)
            return
        probe = self._probe if self._login is not None else None
        group.start_soon(self.boot.watch, self._monitor, probe)
        self.started.set_result(None)
        await self._until_end(qemu)
        if qemu.returncode is not None:
            await self._monitor.last_words()
        if not self._scope.cancel_called:  # or our own signals would look like a crash
            self.failure = self._judge(qemu)
        self._kill()

    async def _launch(self, group: TaskGroup) -> Child:
        """Start QEMU and swtpm together, attach the monitor, let the processors run."""
        plan = self._plan
        with ExitStack() as stack:
            prepared = await prepare(plan, self._state, self._machine, stack)
            self._source, self._login = prepared.source, prepared.login
            self.launch.begin()
            qemu = await self._spawn(group, prepared, stack)
        # Only the processes have their ends now: a death shows as the end of file.
        ends = [child.exited for child in self._children]
        await self._monitor.connect(ends, plan.config.timeouts.launch)
        await self._open_ways()
        if not plan.config.keep:  # before guests run, which leave little of the processors
            group.start_soon(self._record_running, None)
        await self.launch.end_with_others()
        await self._monitor.execute("cont")
        self.boot.enter(BootState.FIRMWARE, "QEMU runs the guest's processors (cont)")
        if plan.config.keep:  # what is not recorded cannot be started again
            await self._record_running(await self._see_machine(prepared.image))
        return qemu

    async def _spawn(self, group: TaskGroup, prepared: PreparedVM, stack: ExitStack) -> Child:
        """Start QEMU and its sidecars with what they inherit, which `stack` closes here."""
        plan = self._plan
        attachments = [
            stack.enter_context(SIDECARS[name](prepared.tools).open())
            for name in plan.config.profile.sidecars
        ]
        monitor = stack.enter_context(self._monitor.open())
        console = stack.enter_context(self.console.open())
        attach = [word for attachment in attachments for word in attachment.argv]
        sockets = [sock for attachment in attachments for sock in attachment.sockets]
        descriptors = Descriptors(
            monitor.fileno(), console.fileno(), prepared.image.fd, self.peripherals.screen.open()
        )
        argv = qemu_arguments(
            plan.config,
            prepared.tools,
            plan.accelerator,
            descriptors,
            attach,
            self._machine.type if self._machine else None,
            prepared.direct_boot,
            prepared.source.format,
        )
        fds = [*descriptors, *prepared.descriptors, *(sock.fileno() for sock in sockets)]
        qemu: Child = await group.start(self._hold, "QEMU", [*plan.prefix, *argv], QEMU_LOG, fds)
        for attached in attachments:  # QEMU takes longest, and is on its way
            ends = [sock.fileno() for sock in attached.own_sockets]
            await group.start(self._hold, attached.name, attached.command, attached.log, ends)
        return qemu

    async def _open_ways(self) -> None:
        """What leads into the VM before its guest runs: VNC, and ports."""
        config = self._plan.config
        if config.vnc is not None:
            await self.peripherals.vnc.start(config.vnc)
        if self._login is not None:
            await self.peripherals.ports.ssh()
        for forward in config.port_forwards:
            await self.peripherals.ports.expose(*forward)

    async def ssh_access(self) -> Access:
        """How to log in to the guest.

        Raises:
            VMNotRunningError: QEMU has ended.
        """
        assert self._login is not None
        return self._login.access(await self.peripherals.ports.ssh())

    async def _reach(self) -> Link:
        return self.link

    async def _probe(self) -> str | None:
        """What speaks for the guest being ready: SSH answers, and its variables are set."""
        try:
            if not await self.link.connect():
                return None
            if env := self._plan.config.env:
                await Environment(self._reach).set(env)
        except SmolVMError as error:
            logger.warning("the guest is not ready yet: %s", error)
            return None
        return "the guest's SSH server answers, and we are logged in"

    async def _see_machine(self, image: BaseImage) -> Machine:
        where = {"path": "/machine", "property": "type"}
        name = str(await self._monitor.execute("qom-get", where)).removesuffix("-machine")
        return Machine(name, image.size, image.mtime_ns, self._source)

    async def _record_running(self, machine: Machine | None) -> None:
        processes = {child.name: child.identity for child in self._children}
        await self._record(status=Status.RUNNING, processes=processes, machine=machine)

    async def _record(self, **update: object) -> None:
        """Write the record anew; a full disk is no reason to end a VM that is not kept."""
        record = self._state.record
        assert record is not None
        try:
            await in_thread(self._state.write, record.model_copy(update=update))
        except OSError as error:
            if self._plan.config.keep and record.machine is None:
                raise
            logger.warning("the record could not be written: %s", error)

    async def _hold(
        self,
        name: str,
        command: Sequence[str],
        log: str,
        fds: Sequence[int],
        *,
        task_status: TaskStatus[Child],
    ) -> None:
        """Run a process until its end; it is killed and reaped if that is not its own doing."""
        path = self._state.path
        child = await spawn(name, command, cwd=path, log=path / log, fds=fds)
        try:
            self._children.append(child)
            task_status.started(child)
            await self._watch(child)
        finally:
            await child.reap()

    async def _watch(self, child: Child) -> None:
        await asyncio.wait([child.exited])
        self._ended.append(child)
        self._news.set()

    async def _until_end(self, qemu: Child) -> None:
        """Until QEMU has ended, or has to."""
        while not (self._ended or self._crash or self._stop.is_set()):
            self._news.clear()
            await self._news.wait()
            if self._why_paused:
                self._why_paused = False
                await self._look_why_paused()
        if self._crash:
            return
        if self._ended:
            first = self._ended[0]
            if first is not qemu and first.returncode == 0:
                await asyncio.wait([qemu.exited], timeout=SAME_END)
            self.report = ShutdownReport(Rung.GUEST, exit_status=qemu.returncode)
            return
        timeouts = self._plan.config.timeouts
        if self._powerdown_timeout is not None:
            timeouts = timeouts.model_copy(update={"powerdown": self._powerdown_timeout})
        await self._record(status=Status.STOPPING)
        self.report = await shut_down(qemu, self._monitor, timeouts, self._plan.on_progress)

    def _on_event(self, event: Event) -> None:
        self._hub.publish(event)
        self.boot.on_event(event)
        self.peripherals.input.on_event(event)
        if isinstance(event, Shutdown):
            self._shutdown = event
        elif isinstance(event, GuestPanicked):
            self._give_up("the guest panicked (GUEST_PANICKED)")
        elif isinstance(event, Reset):
            self.link.abort()  # the guest has forgotten it, and its network would not tell
        elif event.name == "STOP" and self._shutdown is None:
            self.paused = self._why_paused = True
            self._news.set()
        elif event.name == "RESUME":
            self.paused = False

    async def _look_why_paused(self) -> None:
        if (status := await self.guest_status()) == "internal-error":
            self._give_up("the accelerator gave up on the guest (status internal-error)")
        elif status == "io-error":
            logger.error("the guest is paused: QEMU could not write its disk (is the host's full?)")

    def _give_up(self, reason: str) -> None:
        self._crash = self._crash or reason
        self._news.set()

    def _judge(self, qemu: Child) -> VMCrashedError | None:
        """Whether the end was a crash, once QEMU has ended or was found to have to."""
        if self._crash:
            return self._crashed(self._crash)
        sidecars = [child for child in self._children if child is not qemu]
        for sidecar in sidecars:
            if sidecar.returncode or (sidecar.returncode == 0 and qemu.returncode is None):
                return self._crashed(sidecar.report())
        if self.report.rung not in (Rung.GUEST, Rung.POWERDOWN):
            return None
        if qemu.returncode == 0 and self._shutdown is not None:
            if self._shutdown.guest or self._shutdown.reason.startswith("host-qmp"):
                return None
            reason = f"QEMU was ended from outside ({self._shutdown.reason}). "
            return self._crashed(reason + qemu.report())
        hint = oom_hint(self._oom_kills) if qemu.returncode == -signal.SIGKILL else ""
        return self._crashed(hint + qemu.report())

    def _crashed(self, what: str) -> VMCrashedError:
        self.console.drain()
        self.report = replace(self.report, rung=Rung.CRASH)
        console = console_tail(self.console)
        return VMCrashedError(f"{self._plan.config.vm_id} crashed: {what}\n{console}")

    async def _launch_error(self, error: Exception) -> Exception:
        """What to raise for a launch that failed: it tells which process ended, and how."""
        vm_id = self._plan.config.vm_id
        if isinstance(error, LaunchError) and isinstance(error.__cause__, OSError):
            self._kill()  # one could not be spawned: what runs already has nothing to tell
            return LaunchError(f"{vm_id} did not start: {error}")
        if self._children:
            # When one ends the other follows, swtpm with status 0: the reason may come second.
            await asyncio.wait([child.exited for child in self._children], timeout=SAME_END)
        ended = [child for child in reversed(self._children) if child.returncode is not None]
        failed = [child for child in ended if child.returncode != 0] or ended  # QEMU comes last
        told = "\n".join(child.report() for child in failed)
        self._kill()
        if isinstance(error, OSError):
            return unprepared(self._plan.config, error)
        if isinstance(error, LaunchError | VMNotRunningError) and told:
            if IMAGE_IN_USE in told:
                path = self._source.image if self._source else "the image"
                told = f"Another program has {path} open for writing.\n{told}"
            return LaunchError(f"{vm_id} did not start. {told}")
        if isinstance(error, LaunchError):
            running = "\n".join(child.report() for child in self._children)
            return LaunchError(f"{vm_id} did not start: {error}.\n{running}")
        return error

    def _kill(self) -> None:
        for child in self._children:
            child.kill()
