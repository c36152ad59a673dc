"""The interface of a VM that the controls use, in the owner and in attached processes.

`AsyncSmolVM` and its controls do not know whether this process owns the VM (`vm/owner.py`) or is
attached to the owner (`vm/attach/client.py`): both have the attributes and methods of `VM` and
`Run`. An attached process may call the methods that are marked with `@rpc`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import anyio

from smolvm_async.config.internet import InternetSettings
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.login import Access
from smolvm_async.errors import LaunchError, VMNotRunningError
from smolvm_async.foundation.fork import Process, this_process
from smolvm_async.foundation.rpc import rpc
from smolvm_async.foundation.tail import Tail
from smolvm_async.foundation.tasks import check_loop
from smolvm_async.qemu.boot import BootStates
from smolvm_async.qemu.events import EventHub
from smolvm_async.qemu.input import InputEvent, released
from smolvm_async.qemu.pauses import Pauses
from smolvm_async.qemu.peripherals import Peripherals
from smolvm_async.qemu.shutdown import Rung, ShutdownReport
from smolvm_async.qemu.troubles import Troubles
from smolvm_async.state.status import Status

TELLS = 3  # how often a long use of a VM is told during `idle_timeout`; see `vm/idle.py`


class Run(Protocol):
    """One run of a VM, from its launch until its last process has ended.

    Attributes:
        peripherals: Screen, input devices, VNC server and ports.
        link: The SSH connection to the guest.
        session: The guest's agent.
        troubles: The problems that QEMU has reported; they explain a deadline that passed.
        pauses: Whether the guest is paused.
        failure: The error if the run could not start or crashed; otherwise `None`.
        report: The report on the run's end.
    """

    peripherals: Peripherals
    link: Link
    session: Session
    troubles: Troubles
    pauses: Pauses
    failure: Exception | None
    report: ShutdownReport

    @property
    def boot(self) -> BootStates:
        """The boot states that the guest was in."""

    @property
    def console(self) -> Tail:
        """The end of the serial console."""

    @rpc
    async def ssh_access(self) -> Access:
        """Return the address and the keys to log in to the guest."""

    @rpc
    async def stats(self) -> dict[str, Any]:
        """See `AsyncSmolVM.stats()`. Return the fields of the `VMStats`."""


class VM(Protocol):
    """A VM that this process owns or is attached to.

    Attributes:
        config: The arguments of the VM.
        hub: Sends the events of the VM to all subscribers.
        on_crash: Called when the VM has crashed.
    """

    config: VMConfig
    hub: EventHub
    on_crash: Callable[[], None]

    @property
    def status(self) -> Status:
        """See `AsyncSmolVM.status`."""

    @property
    def accelerator(self) -> str:
        """See `AsyncSmolVM.accelerator`."""

    @property
    def run(self) -> Run | None:
        """The current or the last run; `None` before the first run."""

    @property
    def over(self) -> asyncio.Future[None] | None:
        """A future that is done when `run` has ended."""

    @rpc
    async def start(self) -> None:
        """See `AsyncSmolVM.start()`."""

    @rpc
    async def stop(self, timeout: float | None) -> ShutdownReport:
        """See `AsyncSmolVM.stop()`."""

    @rpc
    async def pause(self) -> None:
        """See `AsyncSmolVM.pause()`."""

    @rpc
    async def resume(self) -> str:
        """See `AsyncSmolVM.resume()`. Return the reason if the guest's clock could not be set."""

    @rpc
    async def wake(self) -> None:
        """Note a use of the VM; resume it if it was paused because it was idle."""

    @rpc
    async def set_internet_settings(self, settings: InternetSettings) -> None:
        """See `AsyncSmolVM.set_internet_settings()`."""

    @rpc
    async def delete(self) -> None:
        """See `AsyncSmolVM.delete()`."""

    @rpc
    async def snapshot(self, name: str, labels: dict[str, str]) -> dict[str, Any]:
        """See `AsyncSmolVM.snapshot()`. Return the fields of the `SnapshotInfo`."""

    async def leave(self, *, graceful: bool) -> None:
        """Leave the `async with` block; `graceful` is false if an exception ended the block."""

    async def detach(self) -> None:
        """See `AsyncSmolVM.detach()`."""


def usable(vm: VM, maker: Process) -> VM:
    """Return `vm`, which the process `maker` made; raise `VMNotRunningError` in a forked child."""
    vm_id = vm.config.vm_id
    maker.check(
        vm_id,
        f"To use the running VM here, attach to it with AsyncSmolVM.from_id({vm_id!r}) in an event "
        "loop of this process; else make a new AsyncSmolVM.",
    )
    return vm


def console_tail(console: Tail) -> str:
    """Return the end of the serial console, for an error message."""
    return f"Serial console:\n{console.quote() or '(empty)'}"


def begun(vm: VM) -> tuple[Run, asyncio.Future[None]]:
    """Return the current or the last run, and the future that is done when this run has ended.

    Raises:
        VMNotRunningError: The VM was never started.
        ConfigError: The run belongs to another event loop.
    """
    if vm.run is None or vm.over is None:
        raise VMNotRunningError(f"{vm.config.vm_id} was not started: use async with, or start().")
    check_run(vm.over, vm.config.vm_id)
    return vm.run, vm.over


def check_run(over: asyncio.Future[Any] | None, vm_id: str) -> None:
    """Check that a run has ended or belongs to this event loop; see `check_loop()`."""
    if over is not None and not over.done():
        check_loop(over.get_loop(), vm_id)


async def until_over(over: asyncio.Future[None]) -> None:
    """Wait until a run has ended, maybe in an event loop that was closed since then."""
    if not over.done():
        await asyncio.wait([over])


def running(vm: VM) -> Run:
    """Return the run of a VM whose QEMU is running.

    Raises:
        VMNotRunningError: QEMU is not running.
        VMCrashedError: The VM has crashed.
    """
    run, over = begun(vm)
    if over.done():
        raise ended(vm.config.vm_id, run)
    if vm.status not in (Status.RUNNING, Status.PAUSED, Status.STOPPING):
        raise VMNotRunningError(f"{vm.config.vm_id} is not running yet: it is {vm.status}.")
    return run


async def in_use(vm: VM) -> Run:
    """Return the run of a VM for a call of the user: see `running()`.

    This resumes a VM that was paused because it was idle.
    """
    run = running(vm)
    await wake(vm)
    return run


async def wake(vm: VM) -> None:
    """Note a use of the VM: see `VM.wake()`."""
    if vm.config.idle_timeout is not None:
        await vm.wake()


def last_use(run: Run) -> float:
    """Return the time of the last use of a guest by this process, of `time.monotonic()`.

    This does not include calls of `wake()`.
    """
    return time.monotonic() if run.boot.awaited else run.link.last_use


class Control:
    """Base class of the controls: one group of actions on a running VM.

    Attributes:
        vm: This process's object for the VM; attaching to the VM again replaces the object.
    """

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        self._maker = this_process()
        self._lock = anyio.Lock()

    @property
    def vm(self) -> VM:
        """See the class."""
        return usable(self._vm, self._maker)

    @vm.setter
    def vm(self, vm: VM) -> None:
        self._vm = vm

    @property
    def _turn(self) -> anyio.Lock:
        """The lock that keeps two calls of this control from mixing."""
        usable(self._vm, self._maker)
        return self._lock

    def running(self) -> Run:
        """Return the VM's run. See the function `running()`."""
        return running(self.vm)

    async def in_use(self) -> Run:
        """Return the VM's run. See the function `in_use()`."""
        return await in_use(self.vm)

    async def taking_input(self) -> Run:
        """Return the VM's run; raise an error if the guest is paused: QEMU would drop the input."""
        run = await self.in_use()
        if self.vm.status is Status.PAUSED:
            message = f"{self.vm.config.vm_id} is paused and accepts no input: call resume() first."
            raise run.troubles.explain(VMNotRunningError(message))
        return run

    async def sleep(self, seconds: float) -> None:
        """Sleep during a call of the user, which is a use of the VM all the time."""
        idle = self.vm.config.idle_timeout
        while idle is not None and seconds > idle / TELLS:
            await asyncio.sleep(idle / TELLS)
            await wake(self.vm)
            seconds -= idle / TELLS
        await asyncio.sleep(seconds)

    @contextmanager
    def releasing(self, events: Sequence[InputEvent]) -> Iterator[None]:
        """If the block fails or is cancelled, release the keys and buttons that `events` press."""
        try:
            yield
        except BaseException:
            if self.vm.run is not None:
                self.vm.run.peripherals.input.post(released(events))
            raise


def ended(vm_id: str, run: Run) -> Exception:
    """Return the error that a control raises once the VM has ended."""
    how = f"it ended by {str(run.report.rung)!r}"
    if run.report.rung is Rung.NONE:
        how = "its event loop has ended. Keep one asyncio.run() around all uses of a VM"
    return run.failure or VMNotRunningError(f"{vm_id} is no longer running: {how}.")


def unprepared(config: VMConfig, error: OSError) -> LaunchError:
    """Return the error of `start()` for files that cannot be written, as on a full disk."""
    from smolvm_async.host.restrictions import find_cause  # rarely needed

    path = config.data_dir / config.vm_id
    message = f"{config.vm_id} could not be prepared in {path}: {error}"
    cause = find_cause(str(error), path)
    if cause is None:
        return LaunchError(message)
    return LaunchError(f"{message}. The reason: {cause.reason}.", hint=cause.cure)
