"""VMs that are kept: the same machine boots again, in this process and in later ones."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from smolvm_async import (
    AsyncSmolVM,
    ConfigError,
    ImageError,
    LaunchError,
    Rung,
    Status,
    VMAlreadyExistsError,
    VMNotFoundError,
)
from tests.conftest import BOOT, children, console_shows, vm_in

pytestmark = pytest.mark.anyio

LATER = """
import asyncio, json, re, sys
from smolvm_async import AsyncSmolVM

async def main():
    async with await AsyncSmolVM.from_id("kept", data_dir=sys.argv[1]) as vm:
        await vm.wait_for("ready", timeout=240)
        while "STAND-IN: ready" not in vm.console_log():
            await asyncio.sleep(0.1)
        print(json.dumps(dict(re.findall(r"STAND-IN: (\\w+)=(\\S+)", vm.console_log()))))

asyncio.run(main())
"""


def kept(image: Path, data_dir: Path, vm_id: str = "kept") -> AsyncSmolVM:
    return vm_in(data_dir, image, vm_id=vm_id, keep=True)


def command_line() -> list[str]:
    """QEMU's, without what is a descriptor's number."""
    for pid in children():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "qemu-system" in words[0]:
            return [re.sub(r"fd=\d+", "fd=", word) for word in words]
    raise AssertionError("QEMU does not run")


async def test_a_later_process_boots_the_same_machine(stand_in: Path, data_dir: Path) -> None:
    async with kept(stand_in, data_dir) as vm:
        await vm.wait_for("ready", timeout=BOOT)
        await console_shows(vm, "STAND-IN: ready")
        first = dict(re.findall(r"STAND-IN: (\w+)=(\S+)", vm.console_log()))
        await vm.stop()
        assert vm.status is Status.STOPPED
    assert (first["disk_boots"], first["efi_boots"], first["tpm_resets"]) == ("1", "1", "1")
    (info,) = await AsyncSmolVM.list(data_dir=data_dir)
    assert (info.vm_id, info.status, info.owner, info.keep) == ("kept", "stopped", None, True)

    arguments = [sys.executable, "-c", LATER, str(data_dir)]
    later = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    output, _ = await later.communicate()
    second = json.loads(output)
    assert (second["disk_boots"], second["efi_boots"], second["tpm_resets"]) == ("2", "2", "2")
    for same in ("uuid", "mac", "secure_boot", "root_device"):
        assert second[same] == first[same]
    assert second["boot_id"] != first["boot_id"]

    again = await AsyncSmolVM.from_id("kept", data_dir=data_dir)
    assert again.status is Status.STOPPED
    await again.delete()
    assert str(again.status) == "deleted"
    assert not list(data_dir.iterdir())
    with pytest.raises(VMNotFoundError, match="vm_id='kept'"):
        await AsyncSmolVM.from_id("kept", data_dir=data_dir)


async def test_every_boot_has_the_same_command_line_with_the_machine_type_pinned(
    blank_image: Path, data_dir: Path
) -> None:
    vm = kept(blank_image, data_dir)
    async with vm:
        (newest,) = [word for word in command_line() if word.startswith("q35,")]
    async with vm:
        second = command_line()
    async with await AsyncSmolVM.from_id("kept", data_dir=data_dir) as other:
        third = command_line()
    assert second == third
    (pinned,) = [word for word in second if word.startswith("pc-q35-")]
    assert pinned.partition(",")[2] == newest.partition(",")[2]
    assert not any('"no-flush": true' in word for word in second)  # the disk has to last
    await other.delete()


@pytest.mark.parametrize("end", ["exception", "crash", "cancellation"])
async def test_it_is_kept_however_its_block_ends(
    blank_image: Path, data_dir: Path, end: str
) -> None:
    vm = kept(blank_image, data_dir)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        async with vm:
            if end == "exception":
                raise ZeroDivisionError
            if end == "crash":
                os.kill(min(children()), 9)
            else:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            await asyncio.sleep(30)
    assert not children()
    (info,) = await AsyncSmolVM.list(data_dir=data_dir)
    assert info.status == vm.status == ("crashed" if end == "crash" else "stopped")
    async with vm:
        assert vm.status is Status.RUNNING
    await vm.delete()


async def test_an_id_of_a_kept_vm_is_not_taken_again(blank_image: Path, data_dir: Path) -> None:
    vm = kept(blank_image, data_dir)
    async with vm:
        pass
    for keep in (True, False):
        other = vm_in(data_dir, blank_image, vm_id="kept", keep=keep)
        with pytest.raises(VMAlreadyExistsError, match="from_id"):
            await other.start()
        await other.delete()  # never its own
    assert await AsyncSmolVM.prune(data_dir=data_dir) == []
    async with vm:
        pass
    await vm.delete()


async def test_a_start_that_fails_keeps_what_was_there_and_nothing_else(
    blank_image: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = os.environ["PATH"]
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "qemu-system-x86_64").write_text("#!/bin/sh\nexit 3\n")
    (broken / "qemu-system-x86_64").chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken}:{good}")
    with pytest.raises(LaunchError):
        await kept(blank_image, data_dir).start()
    assert not list(data_dir.iterdir())  # it never ran: there is nothing to keep
    monkeypatch.setenv("PATH", good)
    vm = kept(blank_image, data_dir)
    async with vm:
        pass
    monkeypatch.setenv("PATH", f"{broken}:{good}")
    later = await AsyncSmolVM.from_id("kept", data_dir=data_dir)
    with pytest.raises(LaunchError):
        await later.start()
    assert (await AsyncSmolVM.list(data_dir=data_dir))[0].status == "stopped"
    async with vm:
        pass
    await vm.delete()


async def test_an_image_that_was_changed_since_is_refused(
    blank_image: Path, tmp_path: Path, data_dir: Path
) -> None:
    image = tmp_path / "base.qcow2"
    image.write_bytes(blank_image.read_bytes())
    vm = kept(image, data_dir)
    async with vm:
        pass
    before = image.stat()
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 512", image], check=True)
    with pytest.raises(ImageError, match="was changed after this VM was made"):
        await vm.start()
    image.write_bytes(blank_image.read_bytes())
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    async with vm:  # put back as it was
        pass
    image.unlink()
    later = await AsyncSmolVM.from_id("kept", data_dir=data_dir)
    with pytest.raises(ImageError, match="does not exist"):
        await later.start()
    await later.delete()  # for which nothing else is needed


@pytest.mark.parametrize("name", ["overlay.qcow2", "vars.fd", "tpm"])
@pytest.mark.parametrize("how", ["missing", "link"])
async def test_what_is_not_complete_any_more_is_not_started(
    blank_image: Path, data_dir: Path, tmp_path: Path, name: str, how: str
) -> None:
    vm = kept(blank_image, data_dir)
    async with vm:
        pass
    moved = tmp_path / "moved"
    (data_dir / "kept" / name).rename(moved)
    if how == "link":
        (data_dir / "kept" / name).symlink_to(moved)
    with pytest.raises(ConfigError, match=rf"{name}.* is missing or was replaced"):
        await vm.start()
    await vm.delete()
    assert moved.exists()


async def test_a_deletion_that_dies_halfway_is_finished_by_prune(
    blank_image: Path, data_dir: Path
) -> None:
    async with kept(blank_image, data_dir):
        pass
    script = (
        "import asyncio, os, shutil, sys\n"
        "from smolvm_async import AsyncSmolVM\n"
        "from smolvm_async.state import directory\n"
        "def die(path, lease):\n"
        "    shutil.rmtree(path / 'tpm')\n"
        "    os.kill(os.getpid(), 9)\n"
        "directory._remove = die\n"
        "async def main():\n"
        "    await (await AsyncSmolVM.from_id('kept', data_dir=sys.argv[1])).delete()\n"
        "asyncio.run(main())\n"
    )
    assert subprocess.run([sys.executable, "-c", script, data_dir]).returncode == -9
    (info,) = await AsyncSmolVM.list(data_dir=data_dir)
    assert (info.status, info.keep) == ("orphaned", False)
    await AsyncSmolVM.prune(data_dir=data_dir)
    assert not list(data_dir.iterdir())


async def test_a_kept_vm_of_a_loop_that_ends_is_at_rest(blank_image: Path, data_dir: Path) -> None:
    async def forget() -> None:
        await kept(blank_image, data_dir).start()

    await asyncio.to_thread(asyncio.run, forget())
    assert not children()
    (info,) = await AsyncSmolVM.list(data_dir=data_dir)
    assert info.status == "stopped"
    await (await AsyncSmolVM.from_id("kept", data_dir=data_dir)).delete()


async def test_a_deleted_one_is_not_started_by_who_still_knows_it(
    blank_image: Path, data_dir: Path
) -> None:
    vm = kept(blank_image, data_dir)
    async with vm:
        pass
    other = await AsyncSmolVM.from_id("kept", data_dir=data_dir)
    await other.delete()
    with pytest.raises(VMNotFoundError):
        await vm.start()
    async with kept(blank_image, data_dir) as new:
        with pytest.raises(VMAlreadyExistsError):
            await vm.start()
    await vm.delete()  # not the new one
    assert (await AsyncSmolVM.list(data_dir=data_dir))[0].status == "stopped"
    assert (await new.stop()).rung is Rung.QUIT
    await new.delete()
