"""A deadline that passes: the error quotes what QEMU knows about the reason."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import (
    AsyncSmolVM,
    CommandTimeoutError,
    Event,
    Status,
    Trouble,
    VMNotRunningError,
    VMTimeoutError,
)
from smolvm_async.images.build.debian import DebianImage
from smolvm_async.qemu.troubles import Troubles, halted
from tests.busy_disk import busy_disk
from tests.conftest import child_named, console_shows, each_rung, fill_up

pytestmark = pytest.mark.anyio


async def paused(vm: AsyncSmolVM) -> Trouble:
    """Wait until QEMU itself has paused the guest; return the event that says why."""
    async with asyncio.timeout(60):
        async for event in vm.events():
            if isinstance(event, Trouble) and event.status:
                return event
    raise AssertionError("the VM ended")


def grow(directory: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", directory], check=True)


async def test_a_full_disk_of_the_host_is_named_and_resume_goes_on_once_there_is_space(
    tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = busy_disk(tmp_path / "busy.qcow2", "write")
    vm = AsyncSmolVM(
        os="linux",
        image=image,
        memory=128,
        accel="tcg",
        data_dir=small_disk / "data",
        timeouts=each_rung(2),
    )
    waiting = asyncio.ensure_future(paused(vm))
    async with vm:
        event = await waiting
        assert (event.kind, event.status, event.stops) == ("paused", "io-error", True)
        assert vm.status is Status.PAUSED
        assert f"{small_disk} (tmpfs)" in event.message
        assert "resume()" in event.hint
        assert str(event) in caplog.text
        assert any(record.levelno == logging.WARNING for record in caplog.records)
        attached = await AsyncSmolVM.from_id(vm.vm_id, data_dir=small_disk / "data")
        for each in (vm, attached):
            screen = each.wait_for_screen(changed=True, timeout=0.2)
            for wait in (each.wait_for("ready", 0.2), screen):
                with pytest.raises(VMTimeoutError) as raised:
                    await wait
                assert str(event) in str(raised.value)
                assert [trouble.no_space for trouble in raised.value.troubles] == [True, False]
                assert raised.value.troubles[0].path.endswith("/overlay.qcow2")
        await attached.detach()
        written = len(vm.console_log())
        grow(small_disk, "64m")
        await vm.resume()
        await console_shows(vm, ".", written + 8)
        assert "E" not in vm.console_log()
        with pytest.raises(VMTimeoutError) as raised:
            await vm.wait_for("ready", 0.2)
        assert raised.value.troubles == ()
        fill_up(small_disk)
        await paused(vm)
        report = await vm.stop()
        assert "(io-error)" in report.steps[0].note
        assert "resume()" in report.steps[0].note


def damage(image: Path) -> None:
    """Make the first clusters of a qcow2's content point between two clusters."""
    with image.open("r+b") as file:
        file.seek(40)
        file.seek(struct.unpack(">Q", file.read(8))[0])  # the L1 table
        file.seek((struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00) + 8)  # an L2 table
        file.write(b"".join(struct.pack(">Q", 1 << 63 | n << 16 | 512) for n in range(5, 200)))


async def test_a_damaged_image_is_named_with_the_number_of_failed_reads(
    tmp_path: Path, data_dir: Path
) -> None:
    image = busy_disk(tmp_path / "busy.qcow2", "read", 64 << 20)
    damage(image)
    vm = AsyncSmolVM(os="linux", image=image, memory=128, accel="tcg", data_dir=data_dir)
    async with vm:
        await console_shows(vm, "E", 8)
        with pytest.raises(VMTimeoutError) as raised:
            await vm.wait_for("ready", 0.2)
        await vm.stop(timeout=0)
    error = raised.value
    assert "Image is corrupt" in error.log
    assert error.log in str(error)
    assert {trouble.kind: trouble.count >= 1 for trouble in error.troubles} == {
        "image": True,
        "disk": True,
    }
    by_kind = {trouble.kind: trouble for trouble in error.troubles}
    assert by_kind["image"].path == str(image)
    assert f"qemu-img check {image}" in by_kind["image"].hint
    assert by_kind["disk"].count >= 8
    assert f"({by_kind['disk'].count} times)" in str(error)


async def test_a_deadline_names_a_paused_guest_and_a_stopped_qemu(blank: dict[str, Any]) -> None:
    async with AsyncSmolVM(**blank) as vm:
        await vm.pause()
        with pytest.raises(VMTimeoutError, match=r"The guest is paused\. Call resume\(\)\."):
            await vm.wait_for("ready", 0.1)
        with pytest.raises(VMTimeoutError, match=r"Call resume\(\)"):
            await vm.wait_for_screen(changed=True, timeout=0.1)
        await vm.resume()
        qemu = child_named("qemu")
        os.kill(qemu, signal.SIGSTOP)
        try:
            with pytest.raises(VMTimeoutError, match=f"kill -CONT {qemu}") as raised:
                await vm.wait_for_screen(changed=True, timeout=0.1)
        finally:
            os.kill(qemu, signal.SIGCONT)
        assert [trouble.kind for trouble in raised.value.troubles] == ["host"]
        await vm.stop(timeout=0)


async def test_a_command_that_waits_for_a_full_disk_says_so_and_the_guest_survives(
    debian: DebianImage, small_disk: Path
) -> None:
    grow(small_disk, "64m")
    async with AsyncSmolVM(accel="tcg", data_dir=small_disk / "data") as vm:
        await vm.run("true")
        with pytest.raises(CommandTimeoutError) as raised:
            fill = "dd if=/dev/urandom of=/root/big bs=1M count=100 && sync"
            await vm.run(fill, timeout=30)
        assert {trouble.kind for trouble in raised.value.troubles} == {"disk", "paused"}
        assert f"free some space on {small_disk}" in str(raised.value).lower()
        grow(small_disk, "400m")
        await vm.resume()
        assert (await vm.run("echo alive; dmesg | grep -ci 'i/o error'")).stdout == "alive\n0\n"


def test_many_errors_are_counted_and_reported_at_a_bounded_rate(blank: dict[str, Any]) -> None:
    troubles = Troubles(AsyncSmolVM(**blank)._vm.config)
    data = {"node-name": "disk", "operation": "write", "action": "report", "reason": "No disk"}
    published = [
        troubles.on_event(Event("BLOCK_IO_ERROR", float(number), {**data, "nospace": False}))
        for number in range(1000)
    ]
    assert len([each for each in published if each is not None]) == 10
    (trouble,) = troubles.known.values()
    assert (trouble.count, trouble.timestamp) == (1000, 999.0)


async def test_a_qemu_that_waits_for_the_host_is_named(tmp_path: Path) -> None:
    """The parent of vfork(2) waits in state D until its child has opened its files."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    spawn = (
        "import os, sys; actions = [(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)]; "
        "os.posix_spawn('/bin/true', ['true'], {}, file_actions=actions)"
    )
    process = subprocess.Popen([sys.executable, "-c", spawn, str(fifo)])
    try:
        async with asyncio.timeout(60):
            while not (found := halted(process.pid)):
                await asyncio.sleep(0.01)
        assert "wait for a disk or a file server of the host (state D)" in found[0].message
    finally:
        fifo.open("w").close()
        process.wait()
    assert halted(process.pid) == halted(None) == []


async def test_input_for_a_guest_that_a_full_disk_has_paused_names_the_disk(
    tmp_path: Path, small_disk: Path
) -> None:
    image = busy_disk(tmp_path / "busy.qcow2", "write")
    vm = AsyncSmolVM(os="linux", image=image, memory=128, accel="tcg", data_dir=small_disk / "data")
    waiting = asyncio.ensure_future(paused(vm))
    async with vm:
        await waiting
        with pytest.raises(VMNotRunningError, match="Free some space"):
            await vm.keyboard.press("a")
        await vm.stop(timeout=0)
