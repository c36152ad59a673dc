"""Observation of a VM from outside: boot states, events and the serial console."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from smolvm_async.config.checks import check_timeout, shown
from smolvm_async.controls.interface import (
    VM,
    Run,
    begun,
    check_run,
    console_tail,
    ended,
    until_over,
    wake,
)
from smolvm_async.errors import ConfigError, VMTimeoutError
from smolvm_async.qemu.events import BootState, BootStateChanged, EventStream
from smolvm_async.state.status import Status


class Observation:
    """`AsyncSmolVM`'s boot states, events and serial console."""

    _vm: VM

    async def wait_stopped(self) -> None:
        """Wait until the VM has stopped, for any reason.

        Raises:
            VMCrashedError: The VM crashed.
            VMNotRunningError: The VM was never started.
        """
        run, over = begun(self._vm)
        await until_over(over)
        if run.failure is not None:
            raise run.failure

    @property
    def boot_state(self) -> BootState | None:
        """The VM's boot state, or an ended VM's last boot state; `None` before `start()`."""
        return self._vm.run.boot.last.state if self._vm.run else None

    async def wait_for(
        self, state: BootState | str, timeout: float | None = None
    ) -> BootStateChanged:
        """Wait until the VM has reached a boot state or a later boot state.

        Args:
            state: `"firmware"`, `"operating_system"` or `"ready"`; see `BootState`.
            timeout: Seconds to wait; by default `Timeouts.boot`, which does not count the time of
                a pause, unless QEMU paused the VM (as on a full disk).

        Returns:
            The last change of the boot state, with its evidence and the seconds since `start()`.

        Raises:
            VMTimeoutError: The VM did not reach the state in time.
            VMCrashedError: The VM crashed before it reached the state.
            VMNotRunningError: The VM was never started, or ended before it reached the state.
            ConfigError: The boot state does not exist (a `ValueError`).
        """
        wanted = next((known for known in BootState if known == state), None)
        if wanted is None:
            names = ", ".join(repr(str(known)) for known in BootState)
            raise ConfigError(f"state={shown(state)} is not a boot state: pass one of {names}.")
        check_timeout(timeout)
        run, over = begun(self._vm)
        if over.done():
            raise ended(self._vm.config.vm_id, run)
        await wake(self._vm)
        seconds = self._vm.config.timeouts.boot if timeout is None else timeout
        bound = run.pauses.timeout(seconds) if timeout is None else asyncio.timeout(seconds)
        try:
            async with bound:
                reached = await run.boot.wait_for(wanted)
        except TimeoutError:
            raise _timed_out(self._vm.config.vm_id, run, wanted, seconds) from None
        if reached is None:
            await until_over(over)
            raise ended(self._vm.config.vm_id, run)
        return reached

    def events(self) -> EventStream:
        """Return an iterator over the VM's events from now on: QEMU's and `BootStateChanged`.

        You can call this before `start()`. The iterator ends when the VM ends. An iterator that is
        more than 1024 events behind loses the oldest events.
        """
        over = self._vm.over
        check_run(over, self._vm.config.vm_id)
        stream = self._vm.hub.subscribe()
        if self._vm.status is Status.DELETED or (over is not None and over.done()):
            stream.close()
        return stream

    def console_log(self) -> str:
        """Return the last 256 KiB that the guest has written to its serial console, as text."""
        return self._vm.run.console.text() if self._vm.run else ""

    def follow_console(self) -> AsyncIterator[str]:
        """Return the serial console as text: its last 256 KiB, then new output, until the VM ends.

        Raises:
            VMNotRunningError: The VM was never started.
        """
        run, over = begun(self._vm)
        return run.console.follow(over)


def _timed_out(vm_id: str, run: Run, state: BootState, seconds: float) -> VMTimeoutError:
    """Return the error for a VM that did not reach `state` within `seconds`."""
    last = run.boot.last
    error = VMTimeoutError(
        f"{vm_id} did not reach {str(state)!r} within {seconds:g} s: it has been at "
        f"{str(last.state)!r} since {last.elapsed:.1f} s after start() ({last.evidence}).\n"
        f"{console_tail(run.console)}",
        seconds=seconds,
        state=str(last.state),
        console=run.console.quote(),
    )
    return run.troubles.explain(error)
