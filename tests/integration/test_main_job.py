"""The main job, on the disk that stands in for Windows, and guests that behave badly."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from smolvm_async import (
    AsyncSmolVM,
    BootState,
    BootStateChanged,
    CommandTimeoutError,
    PortChanged,
    Rung,
    Shutdown,
    Status,
    UnsupportedError,
    VMCrashedError,
    VMTimeoutError,
)
from smolvm_async.state.names import SECRETS, SOCKETS
from stand_in import build_stand_in
from tests.conftest import BOOT, children, console_shows, descriptors, vm_in

pytestmark = pytest.mark.anyio

ESP_OFFSET = 1 << 20  # bytes; where the stand-in's first partition begins
AWKWARD = "a b,c'd\"e%20f%5Cé漢=,x" + "y" * 180


async def machine(*arguments: str, data_dir: Path, **options: object) -> AsyncSmolVM:
    """A VM on a stand-in with these kernel arguments."""
    disk = await build_stand_in(kernel_arguments=arguments)
    return vm_in(data_dir, disk, timeouts={"boot": BOOT}, **options)


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
        os="windows", image=image.as_uri(), cpus=1, memory=2048, accel="tcg", data_dir=data_dir
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
        await run_commands(vm)
        await copy_files(vm, tmp_path)
        await set_the_clock(vm)
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
    assert reported["cpus"] == "1"
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


async def run_commands(vm: AsyncSmolVM) -> None:
    """Run commands in the stand-in, whose powershell.exe and cmd.exe are programs of its own."""
    hard = "'\"\\ %PATH% $HOME `id` \n é😀"
    result = await vm.run('cat; printf %s "$V"; exit 3', input="in\n", env={"V": hard})
    assert (result.exit_code, result.stdout) == (3, f"in\n{hard}")
    assert (await vm.run("pwd", BOOT, shell="cmd", cwd="/proc")).stdout == "/proc\n"
    assert (await vm.run(["printf", "%s", hard], BOOT)).stdout == hard
    attached = await AsyncSmolVM.from_id(vm.vm_id, data_dir=vm._handle.config.data_dir)
    async with attached.run_stream("echo one; read line; exec sleep 1200", input="\n") as lines:
        assert (await anext(lines)).text == "one"
    with pytest.raises(CommandTimeoutError):
        await attached.run("exec sleep 1200", timeout=1)
    await attached.detach()
    assert "sleep 1200" not in (await vm.run("ps", BOOT)).stdout


async def copy_files(vm: AsyncSmolVM, directory: Path) -> None:
    """Copy files to the stand-in's drive C and back, in this process and in an attached one."""
    content = os.urandom(200_000)
    (directory / "tree").mkdir()
    (directory / "tree" / "one.bin").write_bytes(content)
    assert await vm.upload_file(directory / "tree", "C:\\Temp\\") == "C:/Temp/tree"
    assert await vm.set_env_vars({"KEPT": "it's"}) == ["KEPT"]
    async with await AsyncSmolVM.from_id(vm.vm_id, data_dir=vm._handle.config.data_dir) as attached:
        back = await attached.download_file("C:/Temp/tree/one.bin", f"{directory}/back/")
        assert (await attached.run("echo $KEPT", BOOT)).stdout == "it's\n"
        info = await attached.guest_info()
    assert back.read_bytes() == content
    assert info.kernel is not None
    assert info.addresses is not None
    assert "10.0.2.15" in info.addresses
    await vm.write_file(r"C:\Temp\note", "text é")
    assert await vm.read_file("C:/Temp/note") == "text é"
    names = [info.name for info in await vm.list_files("C:/Temp")]
    assert names == ["note", "tree"], "no temporary directory"


async def set_the_clock(vm: AsyncSmolVM) -> None:
    """Set the guest's clock back, which a pause ends."""
    await vm.run("date -s @1000000000", BOOT, check=True)
    await vm.pause()
    await vm.resume()
    assert abs(int((await vm.run("date +%s", BOOT)).stdout) - time.time()) < BOOT


async def test_a_guest_without_an_agent_that_ignores_the_power_button(data_dir: Path) -> None:
    vm = await machine("stand_in.agent=off", "stand_in.power_button=ignore", data_dir=data_dir)
    async with vm:
        ready = await vm.wait_for("ready")
        assert "no guest agent; the disk was idle" in ready.evidence
        assert "STAND-IN: ready" in vm.console_log()
        attached = await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir)
        for one in (vm, attached):
            with pytest.raises(UnsupportedError, match=r"run\(\) needs .* virtio-win ISO"):
                await one.run("Get-Process")
            with pytest.raises(UnsupportedError, match=r"spawn\(\) needs .* virtio-win ISO"):
                await one.spawn("Get-Process")
            with pytest.raises(UnsupportedError, match=r"upload_file\(\) needs .* virtio-win ISO"):
                await one.upload_file(__file__, "C:/x")
            with pytest.raises(UnsupportedError, match=r"guest_info\(\) needs .* virtio-win ISO"):
                await one.guest_info()
        await attached.detach()
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


async def test_a_guest_that_panics_is_a_crash(data_dir: Path) -> None:
    panicking = await machine("stand_in.then=panic", data_dir=data_dir)
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
    async with vm_in(data_dir, forged) as vm:
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
