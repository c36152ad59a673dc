"""Launch QEMU with its sidecars: for a VM, for the doctor's probe, and for the benchmarks.

`commands` connects the processes and makes their command lines. `launch` spawns the processes and
connects the monitor. `Processes` owns the processes until they are reaped. The benchmarks' floor
uses only `commands`, to measure the same processes without asyncio and the rest of this library.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from smolvm_async.errors import CommandError, LaunchError, SmolVMError, VMNotRunningError
from smolvm_async.foundation.process import Child, Spawner, spawn
from smolvm_async.foundation.tasks import settle
from smolvm_async.qemu.arguments import Descriptors, MachineSpec, qemu_arguments
from smolvm_async.qemu.console import Console
from smolvm_async.qemu.guest_agent import GuestAgent
from smolvm_async.qemu.monitor import Monitor
from smolvm_async.qemu.parked import Parked
from smolvm_async.qemu.screen import Screen
from smolvm_async.qemu.sidecars import SIDECARS
from smolvm_async.state.names import TIMER_LOG, log_name

SAME_END = 0.5  # seconds: QEMU ends this soon after its sidecar, or the sidecar after QEMU
LOAD_FAILED = "load of migration failed"  # in QEMU's message
TAKE_AGAIN = "The snapshot was altered, or QEMU cannot load it: take the snapshot again."
IMAGE_IN_USE = 'Failed to get shared "write" lock'  # a part of QEMU's error message
RELEASE_IMAGE = (
    "End that program (fuser -v IMAGE or lsof IMAGE lists it), or start from a copy of the image."
)


class Command(NamedTuple):
    """A process to spawn in the VM's directory. It inherits `fds`; its log is the file `log`."""

    name: str
    argv: list[str]
    log: str
    fds: list[int]


@contextmanager
def commands(spec: MachineSpec, descriptors: Descriptors) -> Iterator[list[Command]]:
    """Connect QEMU to its sidecars, and yield the command of each process, QEMU's first.

    Spawn the processes inside the block: at its end, this process closes their sockets.
    """
    fds = [*(fd for fd in descriptors if fd is not None), spec.base_image]
    if (boot := spec.direct_boot) is not None:
        fds += [fd for fd in (boot.kernel, boot.initrd) if fd is not None]
    if spec.ram is not None:
        fds.append(spec.ram.fd)
    fds += [share.fd for share in spec.shares]
    options: list[str] = []
    sidecars: list[Command] = []
    with ExitStack() as ends:
        for name in spec.sidecars:
            attached = SIDECARS[name].connect(spec.tools.sidecars[name], spec.config)
            for end in (*attached.own_sockets, *attached.sockets):
                ends.enter_context(end)
            options += attached.options
            fds += [end.fileno() for end in attached.sockets]
            inherited = [end.fileno() for end in attached.own_sockets]
            sidecars.append(Command(name, attached.command, log_name(name), inherited))
        argv = qemu_arguments(spec, descriptors, options)
        yield [Command("QEMU", argv, log_name("qemu"), fds), *sidecars]


class Processes:
    """QEMU and its sidecars. The end of the `async with` block kills and reaps all of them.

    Attributes:
        children: All processes, QEMU first.
        ended: The processes that have ended, in the order of their ends.
        timer: The process that kills the others when the VM's time is over, if it has a time.
    """

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        self.children: list[Child] = []
        self.ended: list[Child] = []
        self.timer: Child | None = None
        self._on_end = on_end

    async def __aenter__(self) -> Processes:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.kill()
        if self.children:
            await settle(asyncio.wait([child.exited for child in self.children]))
        if self.timer is not None:
            await self.timer.reap()

    async def end_after(self, seconds: float, directory: Path, spawner: Spawner) -> None:
        """End all processes after so many seconds. Raise a `LaunchError` if that is impossible."""
        from smolvm_async.foundation.timer import kill_after  # few VMs need it

        log = directory / TIMER_LOG
        self.timer = await kill_after(
            seconds, self.children, cwd=directory, log=log, spawner=spawner
        )

    @property
    def expired(self) -> bool:
        """True if the time of `end_after()` is over."""
        if self.timer is None:
            return False
        from smolvm_async.foundation.timer import TIME_IS_OVER

        return self.timer.said(TIME_IS_OVER)

    @property
    def qemu(self) -> Child:
        """QEMU's process, after it was spawned."""
        return self.children[0]

    def add(self, child: Child) -> None:
        """Take ownership of a process."""

        def note(_: asyncio.Future[int | None]) -> None:
            self.ended.append(child)
            self._on_end()

        self.children.append(child)
        child.exited.add_done_callback(note)

    def kill(self) -> None:
        """Send SIGKILL to all running processes."""
        for child in self.children:
            child.kill()

    async def explain(self, error: SmolVMError, directory: Path, image: Path | None) -> SmolVMError:
        """Kill all processes after a failed launch, and return the error to raise.

        The error says which process failed, and how. The first process to end is not always the
        cause: when QEMU refuses the machine, its sidecars also end, with status 0; when a sidecar
        fails, QEMU ends with an error that does not mention the sidecar. So wait a moment for all
        processes to end. Report the processes that ended with an error, sidecars before QEMU.

        `directory` is the VM's directory, whose name is the VM's id.
        """
        vm_id = directory.name
        if isinstance(error, LaunchError) and isinstance(error.__cause__, OSError):
            self.kill()  # a spawn failed: the other processes are not the cause
            message, hint = _with_cause(f"{vm_id} did not start", str(error), directory)
            return LaunchError(message, hint=hint, command=error.command)
        if self.children:
            await asyncio.wait([child.exited for child in self.children], timeout=SAME_END)
        ended = [child for child in reversed(self.children) if child.ended]
        unknown = [child for child in ended if child.returncode is None and child.log.count]
        failed = [child for child in ended if child.returncode] or unknown or ended
        self.kill()
        if failed and isinstance(error, LaunchError | VMNotRunningError):
            told = "\n".join(child.report() for child in failed)
            if IMAGE_IN_USE in told:
                message = f"Another program has {image or 'the image'} open for writing."
                message, hint = f"{vm_id} did not start. {message}\n{told}", RELEASE_IMAGE
            else:
                message, hint = _with_cause(f"{vm_id} did not start", told, directory)
                hint = hint or (TAKE_AGAIN if LOAD_FAILED in told else "")
            return _launch_error(message, failed[0], hint)
        if isinstance(error, LaunchError):
            running = "\n".join(child.report() for child in self.children)
            message, hint = _with_cause(f"{vm_id} did not start: {error}", running, directory)
            return _launch_error(message, self.qemu, hint)
        if isinstance(error, CommandError) and not error.hint:
            message, hint = _with_cause(f"{vm_id} could not be prepared", str(error), directory)
            return replace(error, message=message, hint=hint)
        return error


def _with_cause(message: str, told: str, directory: Path) -> tuple[str, str]:
    """Return the message of a failed launch and its hint; `told` is what the processes said."""
    from smolvm_async.host.restrictions import find_cause  # rarely needed

    cause = find_cause(told, directory)
    if cause is None:
        return f"{message}. {told}", ""
    return f"{message}: {cause.reason}.\n{told}", cause.cure


def _launch_error(message: str, child: Child, hint: str) -> LaunchError:
    return LaunchError(
        message, hint=hint, command=child.argv, returncode=child.returncode, log=child.log.quote()
    )


async def launch(
    processes: Processes,
    spec: MachineSpec,
    directory: Path,
    monitor: Monitor,
    console: Console,
    screen: Screen,
    parked: Parked | None = None,
    agent: GuestAgent | None = None,
    *,
    timeout: float,
    amend: Callable[[list[str]], list[str]] = list,
    spawner: Spawner | None = None,
) -> None:
    """Spawn QEMU and its sidecars, and connect the monitor. The guest does not run yet.

    The processes start up concurrently: spawn all of them before waiting for one. Spawn QEMU
    first, because it takes longest. The caller has filled the directory, and has not opened
    monitor, console, screen, parked and agent. QEMU has `timeout` seconds for its first answer;
    `amend` changes QEMU's command line; `spawner` spawns the processes.

    Raises:
        LaunchError: A process could not be spawned (`__cause__` is then an `OSError`) or ended, or
            QEMU did not answer in time.
        OSError: No descriptors or no memory are left.
    """
    with ExitStack() as ends:
        descriptors = Descriptors(
            ends.enter_context(monitor.open()).fileno(),
            ends.enter_context(console.open()).fileno(),
            screen.open(),
            ends.enter_context(parked.open()).fileno() if parked is not None else None,
            ends.enter_context(agent.open()).fileno() if agent is not None else None,
        )
        qemu, *sidecars = ends.enter_context(commands(spec, descriptors))
        for name, argv, log, fds in (qemu._replace(argv=amend(qemu.argv)), *sidecars):
            path = directory / log
            child = await spawn(name, argv, cwd=directory, log=path, fds=fds, spawner=spawner)
            processes.add(child)
    # Our copies of the children's sockets are closed, so the end of a child shows as end of file.
    await monitor.connect([child.exited for child in processes.children], timeout)
