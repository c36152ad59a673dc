"""One VM of a fleet: it waits for its turn, boots, is used, and goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from smolvm_async.config.checks import told
from smolvm_async.errors import MemberFailedError, VMNotRunningError
from smolvm_async.fleet.memory import LEDGER
from smolvm_async.fleet.template import Template
from smolvm_async.foundation.tasks import end_tasks, settle, take_exception
from smolvm_async.qemu.events import BootState
from smolvm_async.vm.vm import AsyncSmolVM

Phase = Literal["a place", "memory", "a turn to boot", "booting", "ready", "deleted", "failed"]
WAITING = ("a place", "memory", "a turn to boot")


@dataclass(frozen=True)
class MemberStatus:
    """One VM of a fleet.

    Attributes:
        vm_id: Its id.
        state: `waiting`, its boot state, `deleted` or `failed`.
        waits_for: What it waits for: `a place`, `memory` or `a turn to boot`; otherwise empty.
        seconds: How long that has been so; of a boot state, since it began to boot.
        error: Why it failed, in one line.
    """

    vm_id: str
    state: str
    waits_for: str
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class FleetStatus:
    """A fleet, at one moment.

    Attributes:
        waiting: How many VMs wait for a place, memory or their turn to boot.
        booting: How many boot.
        ready: How many can be used, or are.
        deleted: How many there were that are gone.
        failed: How many did not start, or crashed.
        members: The VMs: all that the fleet began with, and those of `map()` that live.
    """

    waiting: int
    booting: int
    ready: int
    deleted: int
    failed: int
    members: tuple[MemberStatus, ...]


class Gate:
    """How many VMs of one fleet may live, and boot, at once."""

    def __init__(self, max_live: int, max_booting: int) -> None:
        self._live = asyncio.Semaphore(max_live)
        self.booting = asyncio.Semaphore(max_booting)
        self.waiting = 0  # for a place to live

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place to live, and have it."""
        self.waiting += 1
        try:
            await self._live.acquire()
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._live.release()


class Member:
    """A VM, and the task that it lives in.

    Attributes:
        vm: It; usable while `ready`'s result is there and `over` is not done.
        ready: Done once it has reached the state that was wanted; its exception is why it has not.
        handed_over: Whether somebody has it; `hired`: whether that is `map()`.
        over: The task; its exception, a `MemberFailedError`, is why it ended early.
    """

    def __init__(self, template: Template, gate: Gate, until: BootState) -> None:
        self.vm = template.make()
        self._memory = template.memory
        self.phase: Phase = "a place"
        self.handed_over = self.hired = False
        self.error: MemberFailedError | None = None
        self.ready: asyncio.Future[AsyncSmolVM] = asyncio.get_running_loop().create_future()
        self._gate = gate
        self._until = until
        self._since = time.monotonic()
        self._released = asyncio.Event()
        self.over = asyncio.ensure_future(self._live())
        self.over.add_done_callback(self._ended)

    def status(self) -> MemberStatus:
        """How it is doing."""
        waits_for = self.phase if self.phase in WAITING else ""
        state: str = "waiting" if waits_for else self.phase
        if self.phase in ("booting", "ready"):
            state = str(self.vm.boot_state or BootState.LAUNCHING)
        seconds = time.monotonic() - self._since
        error = str(self.error) if self.error else ""
        return MemberStatus(self.vm.vm_id, state, waits_for, seconds, error)

    async def release(self) -> None:
        """Delete it; when this returns, it is gone, however often the caller is cancelled."""
        self.let_go()
        await settle(asyncio.wait([self.over]))

    def let_go(self) -> None:
        """Have it deleted, without waiting for that."""
        self._released.set()
        if not self.ready.done():
            self.over.cancel()

    async def usable(self) -> bool:
        """Whether another job can be done: what has just been killed is not known to be dead."""
        run = self.vm._run
        return run is not None and await run.guest_status() == "running" and not self.over.done()

    @property
    def wanted(self) -> bool:
        """Whether another VM waits for its place, or for its memory."""
        return self._gate.waiting > 0 or LEDGER.wanted

    def _resident(self) -> int:
        run = self.vm._run
        return run.resident() if run is not None else 0

    def _enter(self, phase: Phase) -> None:
        self.phase, self._since = phase, time.monotonic()

    async def _live(self) -> None:
        try:
            async with self._gate.place():
                self._enter("memory")
                async with LEDGER.promised(self._memory) as promise:
                    promise.touched = self._resident
                    await self._use()
        except Exception as error:
            self._enter("failed")
            vm_id, what = self.vm.vm_id, told(error)
            what = what if what.startswith(vm_id) else f"{vm_id}: {what}"
            self.error = MemberFailedError(what, vm_id)
            raise self.error from error
        self._enter("deleted")

    async def _use(self) -> None:
        try:
            self._enter("a turn to boot")
            async with self._gate.booting:
                self._enter("booting")
                await self.vm.start()
                await self.vm.wait_for(self._until)
            self._enter("ready")
            self.ready.set_result(self.vm)
            await self._until_over()
        finally:
            await settle(self.vm.delete())

    async def _until_over(self) -> None:
        """Until it is released, or has ended by itself or by the user's doing."""
        stopped = asyncio.ensure_future(self.vm.wait_stopped())
        released = asyncio.ensure_future(self._released.wait())
        try:
            await asyncio.wait([stopped, released], return_when=asyncio.FIRST_COMPLETED)
            if stopped.done() and not released.done():
                with suppress(VMNotRunningError):
                    stopped.result()
        finally:
            await end_tasks(stopped, released)

    def _ended(self, over: asyncio.Task[None]) -> None:
        if self.ready.done():
            pass
        elif self.error is not None:
            self.ready.set_exception(self.error)
            take_exception(self.ready)
        else:
            self.ready.cancel()
        take_exception(over)
