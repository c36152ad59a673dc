"""The main job, on the disk that stands in for Windows, and guests that behave badly."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from smolvm_async import (
    AsyncSmolVM,
    BootState,
    BootStateChanged,
    PortChanged,
    Reset,
    Rung,
    Shutdown,
    Status,
    VMCrashedError,
    VMTimeoutError,
)
from smolvm_async.controls.agent.execution import AgentTransport
from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.commands.transport import Command
from smolvm_async.state.names import SECRETS, SOCKETS
from stand_in import build_stand_in
from tests.conftest import BOOT, children, console_shows, descriptors, run_of

pytestmark = pytest.mark.anyio

ESP_OFFSET = 1 << 20  # bytes; where the stand-in's first partition begins
AWKWARD = "a b,c'd\"e%20f%5Cé漢=,x" + "y" * 180


async def machine(*arguments: str, data_dir: Path, **options: object) -> AsyncSmolVM:
    """A VM on a stand-in with these kernel arguments."""
    disk = await build_stand_in(kernel_arguments=arguments)
    settings = {"memory": 2048, "accel": "tcg", "timeouts": {"boot": BOOT}, **options}
    return AsyncSmolVM(os="windows", image=disk, data_dir=data_dir, **settings)  # type: ignore[arg-type]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_files(pid: int) -> dict[str, int]:
    """Return the open files of a process, by path or kind, with their flags."""
    found = {}
    for fd, link in descriptors(pid).items():
        info = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        flags = re.search(r"flags:\s+0?(\d+)", info)
        assert flags
        found[link] = int(flags[1], 8)
    return found


async def test_the_main_job(stand_in: Path, tmp_path: Path, data_dir: Path) -> None:
    image = tmp_path / f"{AWKWARD}.qcow2"
    image.write_bytes(stand_in.read_bytes())
    before = digest(image), image.stat().st_mtime_ns
    data_dir = data_dir / AWKWARD
    vm = AsyncSmolVM(
        os="windows", image=image.as_uri(), cpus=2, memory=2048, accel="tcg", data_dir=data_dir
    )
    events = vm.events()
    async with vm:
        assert (await vm.wait_for("ready", timeout=BOOT)).state is BootState.READY
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in children()}
        assert sorted(names.values()) == ["qemu-system-x86", "swtpm"]
        for pid in names:
            for link, flags in open_files(pid).items():
                if link == str(image):
                    assert flags & os.O_ACCMODE == os.O_RDONLY
                elif flags & os.O_ACCMODE != os.O_RDONLY and link.startswith("/"):
                    assert link.startswith((str(data_dir), "/dev/null", "/memfd:")), link
        assert [entry.name for entry in data_dir.iterdir()] == [vm.vm_id]
        mode = (data_dir / vm.vm_id).stat().st_mode & 0o777
        assert mode == 0o700
        await console_shows(vm, "STAND-IN: ready")
        reported = dict(re.findall(r"STAND-IN: (\w+)=(\S+)", vm.console_log()))
        report = await vm.stop()
        left = {entry.name for entry in (data_dir / vm.vm_id).iterdir()}
        assert {"overlay.qcow2", "qemu.log", "swtpm.log", "vm.json"} <= left
        assert not left & {*SECRETS, *SOCKETS}
        assert (data_dir / vm.vm_id / "qemu.log").read_text() == ""
    assert not list(data_dir.iterdir())
    assert (digest(image), image.stat().st_mtime_ns) == before
    data_dir.rmdir()

    assert report.rung is Rung.POWERDOWN
    assert report.graceful
    assert report.exit_status == 0
    assert reported["secure_boot"] == "1"
    assert reported["setup_mode"] == "0"
    assert reported["tpm_version"] == "2"
    assert re.fullmatch(r"[0-9a-f]{16}", reported["tpm_random"])
    assert reported["root_driver"] == "virtio_scsi"
    assert reported["cpus"] == "2"
    assert 1700 < int(reported["memory_mib"]) <= 2048

    seen = [event async for event in events]
    boot = [event for event in seen if isinstance(event, BootStateChanged)]
    assert [event.state for event in boot] == list(BootState)
    assert "PM1_EN" in boot[2].evidence
    assert "answered a ping" in boot[3].evidence
    assert [event.elapsed for event in boot] == sorted(event.elapsed for event in boot)
    assert any(isinstance(event, PortChanged) and event.open for event in seen)
    (shutdown,) = (event for event in seen if isinstance(event, Shutdown))
    assert shutdown.guest
    assert shutdown.reason == "guest-shutdown"
    assert abs(shutdown.timestamp - boot[3].timestamp) < BOOT


async def test_a_guest_without_an_agent_that_ignores_the_power_button(data_dir: Path) -> None:
    vm = await machine("stand_in.agent=off", "stand_in.power_button=ignore", data_dir=data_dir)
    async with vm:
        ready = await vm.wait_for("ready")
        assert "no guest agent; the disk was idle" in ready.evidence
        assert "STAND-IN: ready" in vm.console_log()
        report = await vm.stop(timeout=2)
    assert report.rung is Rung.QUIT
    assert not report.graceful
    assert [step.rung for step in report.steps] == [Rung.POWERDOWN, Rung.QUIT]
    assert report.steps[0].seconds >= 2
    assert "power button" in vm.console_log()


async def test_stopped_during_early_boot_nothing_is_waited_for(data_dir: Path) -> None:
    async with await machine(data_dir=data_dir) as vm:
        report = await vm.stop()
    assert report.rung is Rung.QUIT
    assert "no operating system" in report.steps[0].note


async def test_a_guest_that_reboots_goes_on(data_dir: Path) -> None:
    vm = await machine("stand_in.then=reboot", data_dir=data_dir)
    seen: list[BootStateChanged] = []
    async with vm:
        async for event in vm.events():
            if isinstance(event, Reset):
                assert event.guest
            if isinstance(event, BootStateChanged):
                seen.append(event)
                if event.state is BootState.READY and BootState.FIRMWARE in states(seen):
                    break
        await console_shows(vm, "STAND-IN: ready", times=2)
        code, output = await run_by_agent(vm, "cat; echo $V; ls /tmp | wc -l; exit 3")
        assert (code, output) == (3, b"input\0value\n3\n")  # the files of the command itself
        boots = re.findall(r"STAND-IN: boot_id=(\S+)", vm.console_log())
        assert "STAND-IN: rebooting" in vm.console_log()
        assert len(set(boots)) == 2
        assert vm.status is Status.RUNNING
    up = [BootState.OPERATING_SYSTEM, BootState.READY]
    first = states(seen).index(BootState.FIRMWARE)  # it may reboot before its agent can answer
    assert states(seen[:first]) in (up, up[:1])
    assert states(seen[first:]) == [BootState.FIRMWARE, *up]
    assert "guest-reset" in seen[first].evidence


def states(changes: list[BootStateChanged]) -> list[BootState]:
    return [change.state for change in changes]


async def run_by_agent(vm: AsyncSmolVM, command: str) -> tuple[int | None, bytes]:
    """Run a command through the agent of the stand-in, which is a Linux with busybox."""
    run, output = run_of(vm), bytearray()
    transport = AgentTransport(Session(run.peripherals.agent, run.pauses))
    given = Command(command, "raw", {"V": "value"}, b"input\0")
    async with transport.executing(
        given, lambda _, data: output.extend(data), lambda _: None
    ) as execution:
        await asyncio.wait([execution.ended])
    return execution.exit_code, bytes(output)


async def test_a_guest_that_panics_is_a_crash(data_dir: Path) -> None:
    # Of two processors, one may hold the console while the other one panics, whose lines then come
    # out among its own or, since it is stopped, never.
    panicking = await machine("stand_in.then=panic", data_dir=data_dir, cpus=1)
    with pytest.raises(VMCrashedError, match="panicked") as raised:
        async with panicking as vm:
            await asyncio.sleep(BOOT)
    assert "Kernel panic" in str(raised.value)
    assert "\x1b" not in str(raised.value)  # the guest does not get at the user's terminal
    assert vm.status is Status.DELETED


async def test_secure_boot_refuses_a_kernel_changed_after_signing(
    stand_in: Path, tmp_path: Path, data_dir: Path
) -> None:
    raw, kernel, forged = tmp_path / "disk.raw", tmp_path / "vmlinuz", tmp_path / "forged.qcow2"
    partition = f"{raw}@@{ESP_OFFSET}"
    run("qemu-img", "convert", "-O", "raw", stand_in, raw)
    listing = run("mdir", "-b", "-/", "-i", partition, "::").split()
    name = next(line for line in listing if "vmlinuz" in line)
    run("mcopy", "-n", "-i", partition, name, kernel)
    content = bytearray(kernel.read_bytes())
    content[len(content) // 2] ^= 1
    kernel.write_bytes(content)
    run("mcopy", "-o", "-i", partition, kernel, name)
    run("qemu-img", "convert", "-O", "qcow2", raw, forged)
    vm = AsyncSmolVM(os="windows", image=forged, data_dir=data_dir, memory=2048, accel="tcg")
    async with vm:
        await console_shows(vm, "bad shim signature")
        with pytest.raises(VMTimeoutError, match="'firmware' since") as raised:
            await vm.wait_for("operating_system", timeout=1)
        error = raised.value
        assert "bad shim signature" in str(error)
        assert "bad shim signature" in error.console
        assert (error.state, error.seconds) == ("firmware", 1)


def run(*command: str | Path) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    ).stdout
