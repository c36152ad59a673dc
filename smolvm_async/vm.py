"""The public class: the order of things."""

from __future__ import annotations

import asyncio
import os as os_module
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

from smolvm_async.config import Timeouts, check_timeout, make_config
from smolvm_async.errors import (
    AcceleratorWarning,
    ConfigError,
    VMCrashedError,
    VMNotRunningError,
    VMTimeoutError,
)
from smolvm_async.events import BootState, BootStateChanged, EventHub, EventStream
from smolvm_async.guests import GUESTS
from smolvm_async.host import choose_accelerator, find_tools
from smolvm_async.images.local import open_image
from smolvm_async.images.reference import local_path
from smolvm_async.progress import ProgressCallback
from smolvm_async.shielding import in_thread, settle
from smolvm_async.shutdown import Rung, ShutdownReport
from smolvm_async.state import StateDirectory, check_data_dir
from smolvm_async.supervisor import Plan, Status, Supervisor


class AsyncSmolVM:
    """A disposable computer.

    ::

        async with AsyncSmolVM(os="windows", image="~/win11.qcow2", memory=4096) as vm:
            await vm.wait_for("ready")

    Leaving the block powers the guest down and deletes the VM; leaving it by an exception or a
    cancellation kills it at once. If QEMU, swtpm or the guest dies meanwhile, the block is
    cancelled and raises `VMCrashedError`. Without `async with`: `start()`, `stop()`, `delete()`.

    Args:
        os: The guest OS: `"windows"`.
        image: The qcow2 to start from: a path or a `file://` URI. It is never written to, and
            any number of VMs can share it.
        memory: MiB; for Windows at least 2048, by default 4096.
        cpus: Cores, shown to the guest as one socket; by default 2.
        vm_id: Lower-case letters, digits and hyphens; by default `vm-` and 8 hex digits.
        accel: `"auto"` takes KVM where it works, and TCG with a warning where it does not;
            `"kvm"` or `"tcg"` insists.
        mounts: Not for Windows guests.
        writable_mounts: Not for Windows guests.
        internet_settings: Not for Windows guests.
        timeouts: Deadlines in seconds: a `Timeouts`, or a mapping of its names.
        data_dir: Where VMs keep their files while they exist; by default
            `$XDG_STATE_HOME/smolvm-async` (`~/.local/state/smolvm-async`).
        on_progress: Called with a `Progress` for each step.

    Raises:
        ConfigError: An argument is wrong (a `ValueError`); nothing was created.
        HostError: The host lacks something (a `ValueError`); nothing was created.
    """

    def __init__(
        self,
        *,
        os: Literal["windows", "linux"] | None = None,
        image: str | os_module.PathLike[str] | None = None,
        memory: int | None = None,
        cpus: int | None = None,
        vm_id: str | None = None,
        accel: Literal["auto", "kvm", "tcg"] = "auto",
        mounts: Sequence[object] = (),
        writable_mounts: bool = False,
        internet_settings: object | None = None,
        timeouts: Timeouts | Mapping[str, float] | None = None,
        data_dir: str | os_module.PathLike[str] | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        config = make_config(
            os=os,
            image=image,
            memory=memory,
            cpus=cpus,
            vm_id=vm_id,
            accel=accel,
            timeouts=timeouts,
            data_dir=data_dir,
            features={
                "mounts": mounts or writable_mounts,
                "internet_settings": internet_settings is not None,
            },
        )
        if on_progress is not None and not callable(on_progress):
            raise ConfigError(f"on_progress={on_progress!r} is wrong: pass a function.")
        path = local_path(config.image)
        with open_image(path):
            pass  # checked now, for an early answer, and again by start()
        check_data_dir(config.data_dir)
        tools = find_tools(config.profile)
        accelerator, warning = choose_accelerator(config.accel)
        if warning is not None:
            warnings.warn(warning, AcceleratorWarning, stacklevel=2)
        self._config = config
        self._plan = Plan(config, path, tools, accelerator, on_progress)
        self._hub = EventHub()
        self._state: StateDirectory | None = None
        self._supervisor: Supervisor | None = None
        self._running: asyncio.Task[None] | None = None
        self._starters = 0
        self._stopping = False
        self._deleted = False
        self._removal: asyncio.Future[None] | None = None
        self._body: asyncio.Task[Any] | None = None
        self._body_cancelling = 0
        self._body_cancelled = False

    def __repr__(self) -> str:
        return f"<AsyncSmolVM {self.vm_id} {self._config.os} {self.status}>"

    @property
    def vm_id(self) -> str:
        """Its id; also the name of its directory."""
        return self._config.vm_id

    @property
    def status(self) -> Status:
        """What the VM is doing."""
        if self._deleted:
            return Status.DELETED
        if self._supervisor is None or self._running is None:
            return Status.CREATED
        if not self._running.done():
            if self._stopping:
                return Status.STOPPING
            return Status.RUNNING if self._supervisor.started.done() else Status.STARTING
        return Status.CRASHED if self._supervisor.failure else Status.STOPPED

    @property
    def accelerator(self) -> str:
        """`kvm` or `tcg`: what QEMU runs the guest with."""
        return self._plan.accelerator.name

    async def __aenter__(self) -> Self:
        if self._body is not None:
            raise ConfigError(f"{self.vm_id} is in an async with block already: use it there.")
        await self.start()
        self._body = asyncio.current_task()
        assert self._body is not None
        self._body_cancelling = self._body.cancelling()
        if self.status is Status.CRASHED:  # before there was a body to cancel
            await self.__aexit__(None, None, None)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        body, self._body = self._body, None
        ours = self._body_cancelled  # whether it was the crash that cancelled the body
        self._body_cancelled = False
        try:
            if error is None:
                await self.stop()
            await self.delete()
        except asyncio.CancelledError as cancellation:
            await self.delete()
            error = error or cancellation
        if ours and body is asyncio.current_task() and body is not None:
            ours = body.uncancel() <= self._body_cancelling
        crash = self._supervisor.failure if self._supervisor else None
        if isinstance(error, asyncio.CancelledError) and not ours:
            raise error
        if error is crash:
            return  # it comes out by itself, or there is none
        if crash is not None and (ours or error is None or isinstance(error, Exception)):
            raise crash from error

    async def start(self) -> None:
        """Start the VM; returns when the guest's processors run. A running VM is left alone.

        A VM that was stopped starts afresh from its image. Cancelled, it leaves nothing behind.

        Raises:
            LaunchError: QEMU or swtpm did not start.
            VMAlreadyExistsError: Another living VM has this id.
            ImageError: The image has changed since, and cannot be used.
            VMNotRunningError: The VM was deleted, or stopped while it started.
        """
        if self._stopping and self._running is not None:
            await asyncio.wait([self._running])
        if self._deleted:
            raise VMNotRunningError(f"{self.vm_id} was deleted: make a new AsyncSmolVM.")
        if self._supervisor is None or self._running is None or self._running.done():
            self._stopping = False
            self._supervisor = Supervisor(self._plan, self._hub)
            self._running = asyncio.ensure_future(self._run(self._supervisor))
        running, supervisor = self._running, self._supervisor
        self._starters += 1
        try:
            await asyncio.wait({running, supervisor.started}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if self._starters == 1:  # nobody else waits for this VM
                await self._discard()
            raise
        finally:
            self._starters -= 1
        if self._stopping:
            await asyncio.wait([running])
            raise VMNotRunningError(f"{self.vm_id} was stopped while it started.")
        if not supervisor.started.done():
            await self._remove_state()
            raise supervisor.failure or VMNotRunningError(f"{self.vm_id} was stopped meanwhile.")

    async def stop(self, timeout: float | None = None) -> ShutdownReport:
        """Power the guest down, and climb the shutdown ladder if it does not.

        The TPM's state and the UEFI variables are gone afterwards; the rest goes with
        `delete()`. Cancelled, it kills the VM at once.

        Args:
            timeout: Seconds for the guest to power down, instead of `Timeouts.powerdown`;
                0 leaves the power button out.

        Returns:
            Which rung ended the VM, and how long each took.
        """
        check_timeout(timeout)
        if self._supervisor is None or self._running is None:
            return ShutdownReport(Rung.NONE)
        if not self._running.done():
            self._stopping = True
            self._supervisor.stop(timeout)
            try:
                await asyncio.wait([self._running])
            except asyncio.CancelledError:
                await self._kill()
                raise
        return self._supervisor.report

    async def delete(self) -> None:
        """Remove the VM and everything of it; one that still runs is killed first."""
        self._deleted = True
        self._hub.close()
        await self._discard()

    async def wait_stopped(self) -> None:
        """Wait until the VM has stopped, whoever stopped it.

        Raises:
            VMCrashedError: It crashed.
            VMNotRunningError: It was never started.
        """
        supervisor, running = self._begun()
        await asyncio.wait([running])
        if supervisor.failure is not None:
            raise supervisor.failure

    @property
    def boot_state(self) -> BootState | None:
        """The boot state it is in, or was in when it ended; `None` before `start()`."""
        return self._supervisor.boot.last.state if self._supervisor else None

    async def wait_for(
        self, state: BootState | str, timeout: float | None = None
    ) -> BootStateChanged:
        """Wait until the VM is in a boot state, or in a later one.

        Args:
            state: `"firmware"`, `"operating_system"` or `"ready"`; see `BootState`.
            timeout: Seconds; by default `Timeouts.boot`.

        Returns:
            The latest change of the boot state, with its evidence and the seconds since start().

        Raises:
            VMTimeoutError: The state was not reached in time.
            VMCrashedError: The VM crashed before.
            VMNotRunningError: The VM was never started, or ended before.
        """
        try:
            state = BootState(state)
        except ValueError:
            names = ", ".join(repr(str(known)) for known in BootState)
            raise ConfigError(f"state={state!r} is no boot state: there are {names}.") from None
        check_timeout(timeout)
        supervisor, running = self._begun()
        if running.done():
            raise self._ended(supervisor)
        deadline = self._config.timeouts.boot if timeout is None else timeout
        try:
            async with asyncio.timeout(deadline):
                reached = await supervisor.boot.wait_for(state)
        except TimeoutError:
            last = supervisor.boot.last
            raise VMTimeoutError(
                f"{self.vm_id} did not reach {str(state)!r} within {deadline:g} s: it is at "
                f"{str(last.state)!r} since {last.elapsed:.1f} s after start() ({last.evidence}).\n"
                f"{supervisor.console_tail()}"
            ) from None
        if reached is None:
            await asyncio.wait([running])
            raise self._ended(supervisor)
        return reached

    def events(self) -> EventStream:
        """The VM's events from this call on: QEMU's, and `BootStateChanged`.

        It may be called before `start()`. The iterator ends when the VM does; one that is more
        than 1024 events behind loses the oldest.
        """
        stream = self._hub.subscribe()
        if self._deleted or (self._running is not None and self._running.done()):
            stream.close()
        return stream

    def console_log(self) -> str:
        """What the guest has written to its serial console: the last 256 KiB, as text."""
        return self._supervisor.console.text() if self._supervisor else ""

    async def run(self, command: str, **options: object) -> NoReturn:
        """Not for Windows guests: raises `UnsupportedError`."""
        self._refuse("run")

    async def snapshot(self, name: str | None = None) -> NoReturn:
        """Not for Windows guests: raises `UnsupportedError`."""
        self._refuse("snapshot")

    @classmethod
    async def from_snapshot(cls, name: str, **options: object) -> NoReturn:
        """Not for Windows guests: raises `UnsupportedError`."""
        GUESTS["windows"].require("from_snapshot")
        raise AssertionError

    def _refuse(self, feature: str) -> NoReturn:
        self._config.profile.require(feature)
        raise AssertionError(f"{feature} is not refused, and not there")

    def _begun(self) -> tuple[Supervisor, asyncio.Task[None]]:
        if self._supervisor is None or self._running is None:
            raise VMNotRunningError(f"{self.vm_id} was not started: use async with, or start().")
        return self._supervisor, self._running

    def _ended(self, supervisor: Supervisor) -> Exception:
        """What a control raises once the VM has ended."""
        return supervisor.failure or VMNotRunningError(
            f"{self.vm_id} does not run any more: it ended by {str(supervisor.report.rung)!r}."
        )

    async def _run(self, supervisor: Supervisor) -> None:
        """The supervisor task: one run, from the directory to the last process reaped."""
        try:
            await in_thread(self._take_state)
            assert self._state is not None
            await supervisor.run(self._state)
        except Exception as error:  # start() raises it
            supervisor.failure = error
        except asyncio.CancelledError:  # the loop is closing, and nobody will call delete()
            await self._remove_state()
            raise
        finally:
            self._hub.close()
            if isinstance(supervisor.failure, VMCrashedError) and self._body is not None:
                self._body_cancelled = self._body.cancel()
            if self._state is not None:
                self._state.clear_secrets()

    def _take_state(self) -> None:
        if self._state is None:
            self._state = StateDirectory.take(self._config.data_dir, self.vm_id)
        else:
            self._state.clear()

    async def _kill(self) -> None:
        """End a run at once; its processes are reaped afterwards, whatever cancels us."""
        if self._supervisor is not None and self._running is not None:
            if not self._running.done():
                self._supervisor.abort()
            await settle(asyncio.wait([self._running]))

    async def _discard(self) -> None:
        try:
            await self._kill()
        finally:
            await self._remove_state()

    async def _remove_state(self) -> None:
        state, self._state = self._state, None
        if state is not None:
            self._removal = asyncio.get_running_loop().run_in_executor(None, state.remove)
        if self._removal is not None:
            await settle(self._removal)
