"""Images of one's own, as a cloud's user has them: own boot loader, own cloud-init, our seed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM
from tests.cloud_image import CloudImage, build_cloud_image

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

CLOUD_INIT = 300  # seconds; it goes on after the guest can be logged in to


@pytest.fixture
async def cloud_image() -> CloudImage:
    """The image for a BIOS and the one for UEFI; built once, then cached."""
    return await build_cloud_image()


async def said(vm: AsyncSmolVM, command: str, timeout: float = 60) -> str:
    """What a command printed that has to succeed."""
    return str((await vm.run(command, check=True, timeout=timeout)).stdout.strip())


async def cloud_init_is_content(vm: AsyncSmolVM) -> None:
    """It has found our seed, and has had nothing to complain about, in it or elsewhere."""
    status = await said(vm, "cloud-init status --wait --long", CLOUD_INIT)
    assert "status: done" in status
    assert "DataSourceNoCloud [seed=/dev/vdb]" in status
    assert (await vm.run("sudo grep WARNING /var/log/cloud-init.log")).stdout == ""
    assert await said(vm, "systemctl --failed --quiet --no-legend") == ""


async def test_a_bios_boots_it_for_a_user_of_ones_own_and_once_more(
    cloud_image: CloudImage, data_dir: Path
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
        await cloud_init_is_content(vm)
        assert await said(vm, "ls /var/lib/cloud/instances") == "cloud"
    await vm.delete()


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
        settings = (await said(vm, "sshd -T")).splitlines()
        assert {"maxsessions 1000", "passwordauthentication no"} <= set(settings)

        assert await vm.upload_file(sent, "/root/data/") == "/root/data/sent"
        came = await vm.download_file("/root/data/sent", tmp_path / "came")
        assert came.read_bytes() == sent.read_bytes()
        await cloud_init_is_content(vm)
