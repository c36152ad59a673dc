"""What `AsyncSmolVM` needs of a VM, whether this process owns it or is attached to its owner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from smolvm_async.config.checks import PortForward, VNCKind
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.controls.ssh.access import Access
from smolvm_async.controls.ssh.link import Link
from smolvm_async.errors import LaunchError, VMNotRunningError
from smolvm_async.foundation.tail import Tail
from smolvm_async.qemu.boot import BootStates
from smolvm_async.qemu.events import EventHub
from smolvm_async.qemu.input import InputEvent
from smolvm_async.qemu.shutdown import ShutdownReport
from smolvm_async.state.record import Status


class Screen(Protocol):
    """See `smolvm_async.qemu.screen.Screen`."""

    async def dump(self, image_format: str, device: str | None, head: int) -> bytes:
        """A picture of the screen."""


class Input(Protocol):
    """See `smolvm_async.qemu.input.Input`."""

    async def send(self, events: Sequence[InputEvent]) -> None:
        """Send input events together."""

    def post(self, events: Sequence[InputEvent]) -> None:
        """Deliver input events, and wait for nothing."""

    async def deliver(self, events: Sequence[InputEvent]) -> None:
        """Send them after all that was sent before; to a paused guest once it is resumed."""

    async def strike(self, events: Sequence[InputEvent], patience: float) -> None:
        """Send what happens on the keyboard, and wait until the guest has read it."""

    async def tablet_taken(self) -> bool:
        """Whether the guest has a driver for the tablet."""


class VNCServer(Protocol):
    """See `smolvm_async.qemu.vnc.VNCServer`."""

    async def start(self, kind: VNCKind) -> str:
        """Listen; returns the URL."""

    async def stop(self) -> None:
        """Close it."""

    async def url(self) -> str | None:
        """Where it listens."""


class Ports(Protocol):
    """See `smolvm_async.qemu.ports.Ports`."""

    async def expose(self, guest_port: int, host_port: int | None) -> int:
        """Forward a port of 127.0.0.1; returns it."""

    async def unexpose(self, host_port: int) -> None:
        """Forward it no longer."""

    async def forwards(self) -> Sequence[PortForward]:
        """What is forwarded."""


class Run(Protocol):
    """One run of a VM, from launch to its last process."""

    @property
    def screen(self) -> Screen:
        """What the guest shows."""

    @property
    def input(self) -> Input:
        """Its keyboard and tablet."""

    @property
    def vnc(self) -> VNCServer:
        """Its VNC server."""

    @property
    def ports(self) -> Ports:
        """What is forwarded into the guest."""

    @property
    def link(self) -> Link:
        """The SSH connection to the guest."""

    async def ssh_access(self) -> Access:
        """How to log in to the guest."""

    @property
    def boot(self) -> BootStates:
        """Its boot states."""

    @property
    def console(self) -> Tail:
        """Its serial console."""

    @property
    def failure(self) -> Exception | None:
        """Why it could not begin, or how it crashed; `None` if all went well."""

    @property
    def report(self) -> ShutdownReport:
        """How it ended."""


class VM(Protocol):
    """A VM.

    Attributes:
        config: Its arguments.
        hub: Hands out its events.
        on_crash: Called when it has crashed.
    """

    config: VMConfig
    hub: EventHub
    on_crash: Callable[[], None]

    @property
    def status(self) -> Status:
        """What it is doing."""

    @property
    def accelerator(self) -> str:
        """What QEMU runs it with; empty before that is known."""

    @property
    def run(self) -> Run | None:
        """Its run: this one or the last one; `None` before the first."""

    @property
    def over(self) -> asyncio.Future[None] | None:
        """Done when `run` is over."""

    async def start(self) -> None:
        """See `AsyncSmolVM.start()`."""

    async def stop(self, timeout: float | None) -> ShutdownReport:
        """See `AsyncSmolVM.stop()`."""

    async def pause(self) -> None:
        """See `AsyncSmolVM.pause()`."""

    async def resume(self) -> None:
        """See `AsyncSmolVM.resume()`."""

    async def delete(self) -> None:
        """See `AsyncSmolVM.delete()`."""

    async def leave(self, *, graceful: bool) -> None:
        """The end of an `async with` block; not graceful if an exception ended it."""

    async def detach(self) -> None:
        """See `AsyncSmolVM.detach()`."""


def console_tail(console: Tail) -> str:
    """The end of the serial console, for an error message."""
    return f"Serial console:\n{console.quote() or '(empty)'}"


def begun(vm: VM) -> tuple[Run, asyncio.Future[None]]:
    """The VM's run, this one or the last, and the future that is done when it is over.

    Raises:
        VMNotRunningError: If there was none.
    """
    if vm.run is None or vm.over is None:
        raise VMNotRunningError(f"{vm.config.vm_id} was not started: use async with, or start().")
    return vm.run, vm.over


def running(vm: VM) -> Run:
    """The run of a VM whose QEMU runs.

    Raises:
        VMNotRunningError: If it does not.
        VMCrashedError: If it has crashed.
    """
    run, over = begun(vm)
    if over.done():
        raise ended(vm.config.vm_id, run)
    if vm.status not in (Status.RUNNING, Status.PAUSED, Status.STOPPING):
        raise VMNotRunningError(f"{vm.config.vm_id} does not run yet: it is {vm.status}.")
    return run


def ended(vm_id: str, run: Run) -> Exception:
    """What a control raises once the VM has ended."""
    return run.failure or VMNotRunningError(
        f"{vm_id} does not run any more: it ended by {str(run.report.rung)!r}."
    )


def unprepared(config: VMConfig, error: OSError) -> LaunchError:
    """What `start()` raises if the VM's directory cannot be filled: the disk is full, ..."""
    path = config.data_dir / config.vm_id
    return LaunchError(f"{config.vm_id} could not be prepared in {path}: {error}")
