"""One VM of a fleet, and its states from waiting for its turn to its deletion."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from smolvm_async.config.checks import shown, told
from smolvm_async.errors import ConfigError, MemberFailedError, SmolVMError, VMNotRunningError
from smolvm_async.fleet.memory import PROMISES
from smolvm_async.fleet.template import Template
from smolvm_async.foundation.tasks import end_tasks, settle, take_exception
from smolvm_async.qemu.events import BootState
from smolvm_async.vm.vm import AsyncSmolVM

Phase = Literal[
    "a snapshot", "a place", "memory", "a turn to boot", "booting", "ready", "deleted", "failed"
]
WAITING = ("a snapshot", "a place", "memory", "a turn to boot")


def check_until(state: object) -> BootState:
    """Check the argument `until` of a fleet, and return the boot state."""
    known = [str(name) for name in BootState if name is not BootState.LAUNCHING]
    if state not in known:
        raise ConfigError(f"until={shown(state)} is wrong: pass one of {', '.join(known)}.")
    return BootState(str(state))


@dataclass(frozen=True)
class MemberStatus:
    """The state of one VM of a fleet.

    Attributes:
        vm_id: The VM's id.
        state: `waiting`, the VM's boot state, `deleted` or `failed`.
        waits_for: `a snapshot`, `a place`, `memory` or `a turn to boot` while the VM waits;
            otherwise empty.
        seconds: Time in this state; for a boot state, time since the VM began to boot.
        error: The reason for a failure, in one line.
    """

    vm_id: str
    state: str
    waits_for: str
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class FleetStatus:
    """The state of a fleet at one moment.

    Attributes:
        waiting: Number of VMs that wait for a snapshot, a place, memory or their turn to boot.
        booting: Number of VMs that boot, or start from a snapshot.
        ready: Number of VMs that are ready or in use.
        deleted: Number of VMs that were deleted.
        failed: Number of VMs that did not start, or crashed.
        members: The VMs that the fleet started with, and the VMs of `map()` that still exist; with
            `warm=`, also the VM that the others become clones of, while this VM exists.
    """

    waiting: int
    booting: int
    ready: int
    deleted: int
    failed: int
    members: tuple[MemberStatus, ...]


class Places:
    """The limits of one fleet: how many VMs may exist, and how many may boot, at once.

    A clone that starts counts as booting: its restore and its login need a processor, too.
    """

    def __init__(self, max_live: int, max_booting: int) -> None:
        self._live = asyncio.Semaphore(max_live)
        self.booting = asyncio.Semaphore(max_booting)
        self.waiting = 0  # VMs that wait for a place

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for a place, and hold the place during the block."""
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
    """A VM of a fleet, and the task that starts and deletes it.

    Args:
        original: Whether the other VMs of the fleet are clones of this VM, and wait for it.

    Attributes:
        vm: The VM; usable while `ready` has a result and `over` is not done.
        ready: Done when the VM has reached the wanted boot state. If the VM failed before, the
            exception says why.
        taken_by: The user of the VM: the caller of the fleet, or `map()`.
        over: The task. Its exception, a `MemberFailedError`, says why the VM ended early.
    """

    def __init__(
        self, template: Template, places: Places, until: BootState, *, original: bool = False
    ) -> None:
        self.vm = template.make()
        self._memory = template.memory
        self._cloned = None if original or template.cloned.done() else template.cloned
        self.phase: Phase = "a place" if self._cloned is None else "a snapshot"
        self.taken_by: Literal["caller", "map"] | None = None
        self.error: MemberFailedError | None = None
        self.ready: asyncio.Future[AsyncSmolVM] = asyncio.get_running_loop().create_future()
        self._places = places
        self._until = until
        self._since = time.monotonic()
        self._deleting = asyncio.Event()
        self.over = asyncio.ensure_future(self._live())
        self.over.add_done_callback(self._on_over)

    def status(self) -> MemberStatus:
        """Return the VM's state."""
        waits_for = self.phase if self.phase in WAITING else ""
        state: str = "waiting" if waits_for else self.phase
        if self.phase in ("booting", "ready"):
            state = str(self.vm.boot_state or BootState.LAUNCHING)
        seconds = time.monotonic() - self._since
        error = str(self.error) if self.error else ""
        return MemberStatus(self.vm.vm_id, state, waits_for, seconds, error)

    async def delete(self) -> None:
        """Delete the VM, and return only afterwards, even if the caller is cancelled."""
        self.delete_soon()
        await settle(asyncio.wait([self.over]))

    def delete_soon(self) -> None:
        """Start to delete the VM; do not wait until it is deleted."""
        self._deleting.set()
        if not self.ready.done():
            self.over.cancel()

    async def usable(self) -> bool:
        """Return whether the VM can run another job.

        This asks QEMU, since this process may not know yet that QEMU was just killed.
        """
        run = self.vm._run
        if run is None:
            return False
        with suppress(SmolVMError):  # then the status shows it
            await run.idleness.wake()
        return await run.guest_status() == "running" and not self.over.done()

    @property
    def others_wait(self) -> bool:
        """True if another VM waits for the place or the memory of this VM."""
        return self._places.waiting > 0 or PROMISES.wanted

    def _own_memory(self) -> int:
        run = self.vm._run
        return run.own_memory() if run is not None else 0

    def _enter(self, phase: Phase) -> None:
        self.phase, self._since = phase, time.monotonic()

    async def _live(self) -> None:
        try:
            if self._cloned is not None:
                await asyncio.shield(self._cloned)
                self._enter("a place")
            async with self._places.take():
                self._enter("memory")
                async with PROMISES.promised(self._memory) as promise:
                    promise.used = self._own_memory
                    await self._use()
        except Exception as error:
            self._enter("failed")
            vm_id, reason = self.vm.vm_id, told(error)
            message = reason if reason.startswith(vm_id) else f"{vm_id}: {reason}"
            self.error = MemberFailedError(message, vm_id)
            raise self.error from error
        self._enter("deleted")

    async def _use(self) -> None:
        try:
            self._enter("a turn to boot")
            async with self._places.booting:
                self._enter("booting")
                await self.vm.start()
                await self.vm.wait_for(self._until)
            self._enter("ready")
            self.ready.set_result(self.vm)
            await self._until_over()
        finally:
            await settle(self.vm.delete())

    async def _until_over(self) -> None:
        """Wait for a call of `delete()` or the VM's end; raise an exception if the VM crashed."""
        stopped = asyncio.ensure_future(self.vm.wait_stopped())
        deleting = asyncio.ensure_future(self._deleting.wait())
        try:
            await asyncio.wait([stopped, deleting], return_when=asyncio.FIRST_COMPLETED)
            if stopped.done() and not deleting.done():
                with suppress(VMNotRunningError):
                    stopped.result()
        finally:
            await end_tasks(stopped, deleting)

    def _on_over(self, over: asyncio.Task[None]) -> None:
        if self.ready.done():
            pass
        elif self.error is not None:
            self.ready.set_exception(self.error)
            take_exception(self.ready)
        else:
            self.ready.cancel()
        take_exception(over)
