"""The pause of an idle VM, beside calls that come just then."""

from __future__ import annotations

import asyncio
import time

import pytest

from smolvm_async.config.options import make_config
from smolvm_async.foundation.tasks import end_tasks
from smolvm_async.qemu.boot import BootStates
from smolvm_async.qemu.events import BootState, BootStateChanged, Event, EventHub
from smolvm_async.qemu.pauses import Pauses
from smolvm_async.vm.idle import Idleness

pytestmark = pytest.mark.anyio

IDLE = 0.02  # seconds


class FakeVM:
    """A VM that notes its pauses; each of them, and each resume, waits for `go_on`."""

    def __init__(self, state: BootState = BootState.READY) -> None:
        self.calls: list[str] = []
        self.go_on = asyncio.Event()
        self.pauses = Pauses()
        changed = BootStateChanged(BootStateChanged.NAME, 0.0, {}, state)
        config = make_config(idle_timeout=IDLE, timeouts={"boot": 60})
        boot = BootStates(EventHub(), changed)
        self.last_use = 0.0
        self.idleness = Idleness(
            config, boot, self.pauses, lambda: self.last_use, self._pause, self._resume
        )

    async def _pause(self) -> None:
        await self._become("pause", "STOP")

    async def _resume(self) -> str:
        await self._become("resume", "RESUME")
        return ""

    async def _become(self, call: str, event: str) -> None:
        self.calls.append(call)
        await self.go_on.wait()
        self.pauses.on_event(Event(event, 0.0))

    async def call(self) -> None:
        await self.idleness.wake()
        self.calls.append("call")

    async def until(self, *calls: str) -> None:
        async with asyncio.timeout(10):
            while self.calls[: len(calls)] != [*calls]:
                await asyncio.sleep(0.001)


async def test_a_call_during_the_pause_waits_for_it_and_resumes_the_vm_once() -> None:
    vm = FakeVM()
    watching = asyncio.ensure_future(vm.idleness.watch())
    await vm.until("pause")
    calls = [asyncio.ensure_future(vm.call()) for _ in range(3)]
    await asyncio.sleep(2 * IDLE)
    assert vm.calls == ["pause"]
    vm.go_on.set()
    await asyncio.gather(*calls)
    await vm.until("pause", "resume", "call", "call", "call", "pause")
    await end_tasks(watching)


async def test_a_resume_that_takes_long_is_not_idleness() -> None:
    vm = FakeVM()
    vm.go_on.set()
    watching = asyncio.ensure_future(vm.idleness.watch())
    await vm.until("pause")
    vm.go_on.clear()
    call = asyncio.ensure_future(vm.call())
    await vm.until("pause", "resume")
    await asyncio.sleep(3 * IDLE)
    vm.go_on.set()
    await call
    assert vm.calls[:3] == ["pause", "resume", "call"]
    await end_tasks(watching)


async def test_a_vm_that_is_used_or_boots_or_stops_is_not_paused() -> None:
    used, booting, stopping = FakeVM(), FakeVM(BootState.FIRMWARE), FakeVM()
    used.last_use = time.monotonic() + 60
    watching = [asyncio.ensure_future(vm.idleness.watch()) for vm in (used, booting, stopping)]
    await stopping.idleness.end()
    await asyncio.sleep(3 * IDLE)
    assert used.calls == booting.calls == stopping.calls == []
    await end_tasks(*watching)
