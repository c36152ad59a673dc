"""The pauses of a guest, and the waits of callers for the guest.

A paused guest looks like a dead guest: it does not answer. So everything that waits for the guest
asks this module first. QEMU reports each pause and its end, whether `pause()`, QEMU itself, a
debugger or another QMP client has stopped the processors.

- Callers wait in `until_running()` and `until_open()`. After a pause, the guest's clock is late;
  `hold()` keeps the callers of `until_open()` waiting until the clock is set.
- `time()` is a clock that stands still during a pause, and `timeout()` is a deadline on this clock.
- A fault is a pause by QEMU (a full disk) or by the guest (a suspend). The caller may not know of a
  fault, so the clock goes on, and the errors of the deadlines tell the reason (see `Troubles`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from smolvm_async.qemu.events import Event


class Pauses:
    """Whether the guest is paused. Feed it with QEMU's events, or in an attached process, `set()`.

    Attributes:
        active: Whether the guest's processors are stopped.
        count: The number of pauses so far.
        fault: Whether QEMU or the guest itself has stopped the processors.
        held: Whether callers of `until_open()` still wait after the pause.
        watchers: Called after each change.
    """

    def __init__(self) -> None:
        self.active = False
        self.count = 0
        self.fault = False
        self.held = False
        self.watchers: set[Callable[[], None]] = set()
        self._error = False  # QEMU has reported a disk error, and pauses the guest next
        self._changed_at = 0.0  # the start of the pause, or its end, in the loop's time
        self._lost = 0.0  # seconds of all pauses in which `time()` stood still
        self._running, self._open = asyncio.Event(), asyncio.Event()
        self._running.set()
        self._open.set()
        self._closed = False

    def on_event(self, event: Event) -> None:
        """Note a pause or its end. Call this with every event of QEMU."""
        if event.name == "BLOCK_IO_ERROR" and event.data.get("action") == "stop":
            self._error = True
        elif event.name == "STOP":
            self.set(active=True, fault=self._error, held=self.held)
        elif event.name == "SUSPEND":
            self.set(active=True, fault=True, held=self.held)
        elif event.name in ("RESUME", "WAKEUP"):
            self._error = False
            self.set(active=False, fault=False, held=self.held)

    def set(self, *, active: bool, fault: bool, held: bool) -> None:
        """Change the state, and wake the callers that need not wait any more."""
        if self._closed or (active, fault, held) == (self.active, self.fault, self.held):
            return
        now = asyncio.get_running_loop().time()
        if self.stands_still:
            self._lost += now - self._changed_at
        if active or self.active:
            self._changed_at = now
        self.count += active and not self.active
        self.active, self.fault, self.held = active, fault, held
        for gate, shut in ((self._running, active), (self._open, active or held)):
            gate.clear() if shut else gate.set()
        for watcher in [*self.watchers]:
            watcher()

    def hold(self, held: bool) -> None:
        """Keep callers of `until_open()` waiting after the pause, or let them go on."""
        self.set(active=self.active, fault=self.fault, held=held)

    def close(self) -> None:
        """Stop all waits for the guest, because the run is over."""
        self.set(active=False, fault=False, held=False)
        self._closed = True

    @property
    def stands_still(self) -> bool:
        """Whether `time()` stands still."""
        return self.active and not self.fault

    def time(self) -> float:
        """Return seconds on a clock that stands still while a caller pauses the guest."""
        now = asyncio.get_running_loop().time()
        return (self._changed_at if self.stands_still else now) - self._lost

    def running_for(self) -> float:
        """Return the seconds since the end of the last pause; 0 during a pause."""
        if self.active:
            return 0.0
        return asyncio.get_running_loop().time() - self._changed_at

    async def until_running(self) -> None:
        """Wait while the guest's processors are stopped."""
        await self._running.wait()

    async def until_open(self) -> None:
        """Wait while the guest's processors are stopped, and until its clock is set."""
        await self._open.wait()

    def timeout(self, seconds: float | None) -> GuestTimeout:
        """Return a deadline for a block, in `seconds` of the guest's running time."""
        return GuestTimeout(self, None if seconds is None else self.time() + seconds)


class GuestTimeout:
    """A deadline for a block, like `asyncio.timeout_at()`, but on the clock `Pauses.time()`."""

    def __init__(self, pauses: Pauses, deadline: float | None) -> None:
        self._pauses = pauses
        self.deadline = deadline
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._pauses.watchers.add(self._apply)
        self._apply()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pauses.watchers.discard(self._apply)
        await self._timeout.__aexit__(kind, error, traceback)

    def restart(self, seconds: float | None) -> None:
        """Let the deadline be in `seconds` from now; `None` for no deadline."""
        self.deadline = None if seconds is None else self._pauses.time() + seconds
        self._apply()

    def _apply(self) -> None:
        if self._timeout.expired():  # too late: the block is being cancelled
            return
        if self.deadline is None or self._pauses.stands_still:
            self._timeout.reschedule(None)
        else:
            now = asyncio.get_running_loop().time()
            self._timeout.reschedule(now + self.deadline - self._pauses.time())
