"""How long a VM lives, what it uses meanwhile, and its pause while nobody uses it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, Rung, Status, VMExpiredError, VMNotRunningError
from smolvm_async.images.build.debian import DebianImage
from tests.conftest import BOOT, processes

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(100, func_only=True)]

OWNER = """
import asyncio, sys, time
from smolvm_async import AsyncSmolVM

async def main():
    image, data_dir, way = sys.argv[1:]
    vm = AsyncSmolVM(os="linux", image=image, memory=128, accel="tcg", data_dir=data_dir,
                     vm_id="one", ttl=2)
    async with vm:
        print("running", flush=True)
        while way == "hangs":
            time.sleep(0.01)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOOT):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_vm_is_deleted_when_its_time_is_over(blank: dict[str, Any], data_dir: Path) -> None:
    async with AsyncSmolVM(**blank, keep=True, ttl=2) as vm:
        side = await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir)
        events = [event.name async for event in side.events()]  # ends with the VM
        assert "GUEST_PANICKED" not in events
        with pytest.raises(VMExpiredError):
            await vm.wait_stopped()
        assert not list(data_dir.iterdir())
        for each in (vm, side):
            assert each.status is Status.DELETED
            calls: list[Callable[[], Awaitable[object]]] = [
                *(each.stats, each.screenshot, each.pause, each.wait_stopped),
                lambda each=each: each.keyboard.press("a"),  # type: ignore[misc]
            ]
            for call in calls:
                with pytest.raises(VMExpiredError, match=rf"{vm.vm_id} is over: .*2 s \(ttl=\)"):
                    await call()
        with pytest.raises(VMExpiredError):
            await vm.start()
        assert (await vm.stop()).rung is Rung.TTL


async def test_a_time_that_is_over_before_the_vm_runs_is_told(
    blank: dict[str, Any], data_dir: Path
) -> None:
    vm = AsyncSmolVM(**blank, ttl=0.001)
    for _ in range(2):
        with pytest.raises(VMExpiredError, match=r"0\.001 s \(ttl=\)"):
            await vm.start()
    assert vm.status is Status.DELETED
    assert not list(data_dir.iterdir())


@pytest.mark.parametrize("way", ["hangs", "is stopped"])
async def test_its_time_ends_also_if_its_owner_hangs_or_is_stopped(
    blank_image: Path, data_dir: Path, way: str
) -> None:
    arguments = [sys.executable, "-c", OWNER, str(blank_image), str(data_dir), way]
    owner = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        assert await owner.stdout.readline() == b"running\n"
        assert processes(data_dir)
        if way == "is stopped":
            owner.send_signal(signal.SIGSTOP)
        await until(lambda: not processes(data_dir))  # without any other process
        async with asyncio.timeout(BOOT):
            while await AsyncSmolVM.list(data_dir=data_dir):
                await asyncio.sleep(0.02)
        assert not processes(data_dir)
        assert sorted(os.listdir(data_dir / "one")) == ["host", "vm.json"]
        with pytest.raises(VMExpiredError):
            await AsyncSmolVM.from_id("one", data_dir=data_dir)
        if way != "hangs":
            owner.send_signal(signal.SIGCONT)
            await until(lambda: not list(data_dir.iterdir()))  # its loop goes on
    finally:
        with contextlib.suppress(ProcessLookupError):
            owner.kill()
        await owner.communicate()
    await AsyncSmolVM.prune(data_dir=data_dir)
    assert not list(data_dir.iterdir())


async def test_an_idle_vm_is_paused_until_the_next_call(
    debian: DebianImage, data_dir: Path
) -> None:
    async with AsyncSmolVM(accel="tcg", data_dir=data_dir, idle_timeout=1.2) as vm:
        side = await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir)
        events, names = vm.events(), list[str]()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: vm.run("sleep 2.4", check=True),
            lambda: used_for_long(side),
            lambda: side.keyboard.press("a", hold=2.4),
            vm.screenshot,
        ]
        for pauses, call in enumerate(calls, start=1):
            await until(lambda: vm.status is Status.PAUSED)
            assert (await vm.stats()).uptime > 0
            assert vm.status is Status.PAUSED, "stats() is not a use"
            await call()
            assert str(vm.status) == "running"
            names += [event.name for event in events.pending()]
            assert names.count("STOP") == pauses, "a call that takes long is a use"

        await vm.pause()
        await vm.screenshot()
        assert vm.status is Status.PAUSED, "the user has paused it"
        with pytest.raises(VMNotRunningError, match="call resume"):
            await side.keyboard.press("a")
        await side.resume()
        await until(lambda: vm.status is Status.PAUSED)
        await side.detach()


async def used_for_long(vm: AsyncSmolVM) -> None:
    async with await vm.spawn("sleep 2.4") as process:
        await process.wait()


async def test_the_resources_that_a_vm_uses_are_measured(
    debian: DebianImage, data_dir: Path
) -> None:
    size = 8 << 20
    async with AsyncSmolVM(accel="tcg", data_dir=data_dir, labels={"for": "a test"}) as vm:
        side = await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir)
        before = await side.stats()
        work = f"head -c {size} /dev/urandom >data; sync; head -c {2 * size} /dev/vda >/dev/null"
        send = "s.sendto(bytes(1000), ('10.0.2.2', 9))"
        work += (
            f'; python3 -c "import socket; s = socket.socket(type=2); [{send} for _ in range(99)]"'
        )
        await vm.run(work, check=True)
        after = await side.stats()
        assert after.uptime > before.uptime > 0
        used = after.processor_time - before.processor_time
        assert 0 < used <= (after.uptime - before.uptime) * (os.cpu_count() or 1)
        assert before.own_memory <= before.resident <= 512 + 200
        assert size <= after.disk_written - before.disk_written < 4 * size
        assert after.disk_read > before.disk_read
        assert after.disk_size - before.disk_size >= size
        assert before.network_sent is before.network_received is None
        assert after.network_received is not None
        assert after.network_sent is not None
        assert 99_000 < after.network_sent < 200_000
        (info,) = await AsyncSmolVM.list(data_dir=data_dir)
        assert info.resident is not None
        assert info.processors is not None
        assert info.labels == {"for": "a test"}
        await side.detach()
