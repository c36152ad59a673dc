"""What one sees of a guest from outside: how far it is, what happens to it, what it writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from smolvm_async.config.checks import check_timeout
from smolvm_async.controls.interface import VM, begun, console_tail, ended
from smolvm_async.errors import ConfigError, VMTimeoutError
from smolvm_async.qemu.events import BootState, BootStateChanged, EventStream
from smolvm_async.state.record import Status


class Observation:
    """`AsyncSmolVM`'s boot states, events and serial console."""

    _vm: VM

    async def wait_stopped(self) -> None:
        """Wait until the VM has stopped, whoever stopped it.

        Raises:
            VMCrashedError: It crashed.
            VMNotRunningError: It was never started.
        """
        run, over = begun(self._vm)
        await asyncio.wait([over])
        if run.failure is not None:
            raise run.failure

    @property
    def boot_state(self) -> BootState | None:
        """The boot state it is in, or was in when it ended; `None` before `start()`."""
        return self._vm.run.boot.last.state if self._vm.run else None

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
        run, over = begun(self._vm)
        if over.done():
            raise ended(self._vm.config.vm_id, run)
        deadline = self._vm.config.timeouts.boot if timeout is None else timeout
        try:
            async with asyncio.timeout(deadline):
                reached = await run.boot.wait_for(state)
        except TimeoutError:
            last = run.boot.last
            vm_id = self._vm.config.vm_id
            raise VMTimeoutError(
                f"{vm_id} did not reach {str(state)!r} within {deadline:g} s: it is at "
                f"{str(last.state)!r} since {last.elapsed:.1f} s after start() ({last.evidence}).\n"
                f"{console_tail(run.console)}"
            ) from None
        if reached is None:
            await asyncio.wait([over])
            raise ended(self._vm.config.vm_id, run)
        return reached

    def events(self) -> EventStream:
        """The VM's events from this call on: QEMU's, and `BootStateChanged`.

        It may be called before `start()`. The iterator ends when the VM does; one that is more
        than 1024 events behind loses the oldest.
        """
        stream = self._vm.hub.subscribe()
        over = self._vm.over
        if self._vm.status is Status.DELETED or (over is not None and over.done()):
            stream.close()
        return stream

    def console_log(self) -> str:
        """What the guest has written to its serial console: the last 256 KiB, as text."""
        return self._vm.run.console.text() if self._vm.run else ""

    def follow_console(self) -> AsyncIterator[str]:
        """The serial console as text: its last 256 KiB, then what comes, until the VM ends.

        Raises:
            VMNotRunningError: The VM was never started.
        """
        run, over = begun(self._vm)
        return run.console.follow(over)
