"""The shutdown ladder: power button, `quit`, SIGTERM, SIGKILL.

Each rung except the last has a deadline; after it, `shut_down` tries the next rung. To add a rung,
add a `Rung` in the ladder's order, its text in `ENDINGS`, a row in `shut_down` with the function
that acts, and its deadline in `Timeouts`.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from smolvm_async.config.vm_config import Timeouts
from smolvm_async.errors import MonitorError, VMNotRunningError, VMTimeoutError
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.process import Child
from smolvm_async.foundation.progress import Meter, ProgressCallback
from smolvm_async.qemu.acpi import os_in_control, power_button_enabled
from smolvm_async.qemu.monitor import Monitor

logger = get_logger(__name__)

PRESS_AGAIN = 5.0  # seconds; the guest loses a press if it does not listen to the button yet
EXIT = 1.0  # seconds for QEMU to exit after the end of the monitor's connection
POLL = 0.1  # seconds between two checks whether the guest listens to the button
WAKE = {
    "paused": "cont",
    "postmigrate": "cont",
    "suspended": "system_wakeup",
}  # by QEMU's run state


Act = Callable[[Child, Monitor], Coroutine[Any, Any, str]]


class Rung(StrEnum):
    """The cause of a VM's end: a rung of the shutdown ladder, in order, or another cause.

    GUEST: the guest had powered itself down. CRASH: the VM had crashed. TTL: its time was over.
    NONE: no VM was running.
    """

    POWERDOWN = "powerdown"
    QUIT = "quit"
    SIGTERM = "sigterm"
    SIGKILL = "sigkill"
    GUEST = "guest"
    CRASH = "crash"
    TTL = "ttl"
    NONE = "none"


ENDINGS = {
    Rung.POWERDOWN: "the guest powered itself down",
    Rung.QUIT: "QEMU was told to quit",
    Rung.SIGTERM: "QEMU was ended by SIGTERM",
    Rung.SIGKILL: "QEMU was killed",
    Rung.GUEST: "the guest had shut itself down",
    Rung.CRASH: "the VM had crashed",
    Rung.TTL: "the VM's time was over",
    Rung.NONE: "the VM was not running",
}


@dataclass(frozen=True)
class Step:
    """A rung that `shut_down` tried: its duration in seconds, and a remark on the result."""

    rung: Rung
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class ShutdownReport:
    """A report on the end of a VM.

    Attributes:
        rung: The cause of the end.
        seconds: The duration of all rungs together.
        steps: The rungs that `shut_down` tried, in order.
        exit_status: QEMU's exit status, negative for a signal; `None` if QEMU was not running, or
            if the exit status is unknown, as in a process that ignores SIGCHLD.
    """

    rung: Rung
    seconds: float = 0.0
    steps: tuple[Step, ...] = ()
    exit_status: int | None = None

    @property
    def graceful(self) -> bool:
        """True if the guest itself shut down."""
        return self.rung in (Rung.POWERDOWN, Rung.GUEST)


async def shut_down(
    qemu: Child, monitor: Monitor, timeouts: Timeouts, on_progress: ProgressCallback | None
) -> ShutdownReport:
    """Try the rungs in order until QEMU has ended. Skip a rung whose deadline is 0."""
    began = time.monotonic()
    meter = Meter(on_progress, "stop")
    ladder: list[tuple[Rung, Act, float]] = [
        (Rung.POWERDOWN, _power_down, timeouts.powerdown),
        (Rung.QUIT, _quit, timeouts.quit),
        (Rung.SIGTERM, partial(_signal, signal.SIGTERM), timeouts.terminate),
    ]
    steps: list[Step] = []
    for rung, act, deadline in ladder:
        if not qemu.ended and deadline > 0:
            meter.report(f"{rung}: up to {deadline:g} s")
            step = await _climb(rung, act(qemu, monitor), deadline, qemu, monitor)
            steps.append(step)
            if step.note:
                meter.report(f"{rung}: {step.note}")
    if not qemu.ended:
        killed = time.monotonic()
        await qemu.reap()
        steps.append(Step(Rung.SIGKILL, time.monotonic() - killed))
    rung = steps[-1].rung if steps else Rung.GUEST
    return ShutdownReport(rung, time.monotonic() - began, tuple(steps), qemu.returncode)


async def _climb(
    rung: Rung, act: Coroutine[Any, Any, str], deadline: float, qemu: Child, monitor: Monitor
) -> Step:
    began = time.monotonic()
    try:
        async with asyncio.timeout(deadline):
            note = await act
    except TimeoutError:
        late = VMTimeoutError(f"QEMU did not end within {deadline:g} s")
        note = str(monitor.explain(late))
    except MonitorError as error:
        note = str(error)
    except VMNotRunningError:
        # QEMU closes the monitor's connection just before it exits.
        note = "" if await _ended_within(qemu, EXIT) else "QEMU closed its monitor but did not end"
    step = Step(rung, time.monotonic() - began, note)
    logger.debug("%s: %.3f s %s", rung, step.seconds, note)
    return step


async def _power_down(qemu: Child, monitor: Monitor) -> str:
    """Press the power button until the guest has powered down, and return a remark.

    If the guest cannot power down, return at once, so that `shut_down` tries the next rung.
    """
    status = await monitor.execute("query-status")
    if wake := WAKE.get(status["status"]):  # the guest would not notice the button
        await monitor.execute(wake)
        status = await monitor.execute("query-status")
    if not status["running"]:
        halted = VMTimeoutError(f"the guest's processors do not run ({status['status']})")
        return str(monitor.explain(halted))
    if not await os_in_control(monitor):
        return "no operating system runs, so the guest cannot power down"
    while not await power_button_enabled(monitor):
        if await _ended_within(qemu, POLL):
            return ""
    presses = 0
    while not qemu.ended:
        await monitor.execute("system_powerdown")
        presses += 1
        await _ended_within(qemu, PRESS_AGAIN)
    return "" if presses == 1 else f"the power button was pressed {presses} times"


async def _quit(qemu: Child, monitor: Monitor) -> str:
    await monitor.execute("quit")
    await asyncio.wait([qemu.exited])
    return ""


async def _signal(number: signal.Signals, qemu: Child, monitor: Monitor) -> str:
    qemu.signal(number)
    await asyncio.wait([qemu.exited])
    return ""


async def _ended_within(qemu: Child, seconds: float) -> bool:
    await asyncio.wait([qemu.exited], timeout=seconds)
    return qemu.ended
