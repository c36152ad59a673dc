"""Track the boot states of a VM, and wait for a boot state. `events.BootState` lists the states.

QEMU has no event for most boot states, so the tracker combines signs from outside the guest:

- `cont` and QEMU's RESET start the firmware.
- An operating system runs as soon as it has enabled ACPI events. The tracker polls `acpi.py`.
- The guest is ready when its SSH server accepts the login. Without SSH, the guest is ready when its
  agent has answered a ping; without an agent, when its disk has been idle for 10 s.
  A paused guest is not idle.

A reset may come at any time, even during a probe. The result of this probe describes the boot
before the reset, so the tracker drops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from smolvm_async.errors import MonitorError, VMNotRunningError
from smolvm_async.foundation.progress import Progress, ProgressCallback, report
from smolvm_async.qemu.acpi import os_in_control
from smolvm_async.qemu.events import (
    BootState,
    BootStateChanged,
    Event,
    EventHub,
    Reset,
)
from smolvm_async.qemu.monitor import Monitor
from smolvm_async.qemu.pauses import Pauses

POLL = 0.25  # seconds between two polls of a booting guest
EARLY = 10.0  # seconds until the first probe if no operating system was detected
PROBE = 0.05  # seconds between two probes of a guest that is not ready
IDLE = 10.0  # seconds without disk I/O after which a guest without an agent counts as ready

# Returns the evidence that the guest is ready; `None` if the guest is not ready yet.
Probe = Callable[[], Awaitable[str | None]]


class BootStates:
    """The latest boot state of a VM, and the tasks that wait for a boot state.

    Attributes:
        last: The latest change of the boot state.
        changed_at: The time of this change, of `time.monotonic()`.
    """

    def __init__(self, hub: EventHub, first: BootStateChanged) -> None:
        self.changed_at = time.monotonic()
        self._hub = hub
        self._waiting: list[tuple[BootState, asyncio.Future[BootStateChanged | None]]] = []
        self._ended = False
        self.last = first

    def change(self, change: BootStateChanged) -> None:
        """Enter a boot state, publish the event and wake the waiting tasks."""
        self.last, self.changed_at = change, time.monotonic()
        self._hub.publish(change)
        for wanted, future in self._waiting:
            if change.state.reaches(wanted) and not future.done():
                future.set_result(change)

    @property
    def awaited(self) -> bool:
        """True while a task waits for a boot state."""
        return bool(self._waiting)

    def end(self) -> None:
        """Note that the VM has ended, and wake all waiting tasks."""
        self._ended = True
        for _, future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait_for(self, state: BootState) -> BootStateChanged | None:
        """Wait until the VM has reached `state` or a later state; `None` if the VM ended before."""
        if self.last.state.reaches(state):
            return self.last
        if self._ended:
            return None
        future: asyncio.Future[BootStateChanged | None] = asyncio.Future()
        self._waiting.append((state, future))
        try:
            return await future
        finally:
            self._waiting.remove((state, future))


class BootTracker(BootStates):
    """A tracker of a VM's boot states from `start()` on. See the module's docstring."""

    def __init__(self, hub: EventHub, pauses: Pauses, on_progress: ProgressCallback | None) -> None:
        self._pauses = pauses
        self._on_progress = on_progress
        self._started = time.monotonic()
        self._changed = asyncio.Event()
        self._resets = 0
        super().__init__(hub, BootStateChanged(BootStateChanged.NAME, time.time()))
        self.enter(BootState.LAUNCHING, "start() was called")

    def enter(self, state: BootState, evidence: str) -> None:
        """Enter a boot state, for the reason in `evidence`."""
        elapsed = time.monotonic() - self._started
        name = BootStateChanged.NAME
        self.change(BootStateChanged(name, time.time(), {}, state, evidence, elapsed))
        report(self._on_progress, Progress("boot", f"{state}: {evidence}", elapsed))
        self._changed.set()
        self._changed = asyncio.Event()

    def on_event(self, event: Event) -> None:
        """Enter a new boot state if an event of QEMU shows one."""
        if isinstance(event, Reset):
            self._resets += 1
            self.enter(BootState.FIRMWARE, f"the machine was reset ({event.reason})")

    async def watch(self, monitor: Monitor, probe: Probe, *, guess: bool) -> None:
        """Poll for the states without an event of QEMU, until cancelled or QEMU has ended.

        With `guess`, a guest with an idle disk is ready, too.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(self._probe_until_ready, probe)
            await self._look(monitor, guess=guess)
            group.cancel_scope.cancel()

    async def _look(self, monitor: Monitor, *, guess: bool) -> None:
        await asyncio.sleep(POLL)  # the firmware has only just started
        while True:
            try:
                if self.last.state is BootState.FIRMWARE and await os_in_control(monitor):
                    evidence = "an operating system listens to ACPI events (PM1_EN)"
                    if self.last.state is BootState.FIRMWARE:
                        self.enter(BootState.OPERATING_SYSTEM, evidence)
                elif self.last.state is BootState.OPERATING_SYSTEM and guess:
                    await self._look_at_disk(monitor)
            except MonitorError:
                pass  # QEMU is busy; the next poll may succeed
            except VMNotRunningError:
                return
            if self.last.state is BootState.READY:
                await self._changed.wait()  # until a reset
            else:
                await asyncio.sleep(POLL)

    async def _probe_until_ready(self, probe: Probe) -> None:
        while True:
            if self.last.state is BootState.READY:
                await self._changed.wait()
                continue
            if self.last.state is BootState.FIRMWARE:  # server and agent probably do not run yet
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(EARLY):
                        await self._changed.wait()
            resets = self._resets
            evidence = await probe()
            if evidence is not None and resets == self._resets:
                self._become_ready(evidence)
            else:
                await asyncio.sleep(PROBE)

    def _become_ready(self, evidence: str) -> None:
        for state in (BootState.OPERATING_SYSTEM, BootState.READY):
            if not self.last.state.reaches(state):
                self.enter(state, evidence)

    async def _look_at_disk(self, monitor: Monitor) -> None:
        entered = self.last
        running = min(
            time.monotonic() - self._started - entered.elapsed, self._pauses.running_for()
        )
        if running < IDLE:
            return
        idle = _idle_seconds(await monitor.execute("query-blockstats"))
        if idle >= IDLE and self.last is entered:
            self.enter(BootState.READY, f"no guest agent; the disk was idle for {IDLE:g} s")


def _idle_seconds(blockstats: Any) -> float:
    """Return the seconds since the last I/O on the guest's disk, from `query-blockstats`."""
    idle = [
        device["stats"]["idle_time_ns"] / 1e9
        for device in blockstats
        if str(device.get("node-name")).startswith("disk") and "idle_time_ns" in device["stats"]
    ]
    return min(idle, default=0.0)
