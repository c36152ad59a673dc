"""Host directories in a real guest: what it sees, what it may change, and no way out of them."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, MountError, SnapshotError
from smolvm_async.images.build.debian import DebianImage
from tests.integration.trees import digest_tree

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(150, func_only=True)]

SECRET = "the host's secret"
MANY = 500  # files
Said = Callable[[str], Coroutine[Any, Any, str]]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A directory of the host with a secret, a project to read, and data to change."""
    host = tmp_path / "host"
    for name in ("project", "data"):
        (host / name).mkdir(parents=True)
        (host / name / "out").symlink_to("../secret")
    (host / "secret").write_text(SECRET)
    (host / "project/a").write_text("the host's")
    (host / "project/old").write_text("old")
    (host / "project/tool").write_text("#!/bin/sh\necho built\n")
    (host / "project/tool").chmod(0o755)
    (host / "project/own link").symlink_to("a")
    os.mkfifo(host / "project/pipe")
    (host / "data/b").write_text("before")
    (host / "project/many").mkdir()
    for number in range(MANY):
        (host / "project/many" / f"file {number}").touch()
    if os.getuid() == 0:  # git in the guest must trust a repository of another user
        for path in (host / "project", *(host / "project").rglob("*")):
            os.chown(path, 1234, 1234, follow_symlinks=False)
    return host


async def test_a_guest_reads_and_writes_host_directories_and_finds_no_way_out(
    debian: DebianImage, data_dir: Path, host: Path
) -> None:
    before = digest_tree(host)
    mounts = [f"{host}/project", f"{host}/data:/mnt/my data:rw"]
    async with AsyncSmolVM(accel="tcg", data_dir=data_dir, mounts=mounts) as vm:

        async def said(command: str) -> str:
            whole = f"cd /workspace/project && {command}"
            return (await vm.run(whole, check=True, timeout=120)).stdout.strip()

        await _change_an_overlay(said)
        assert digest_tree(host) == before

        await _change_both_sides(said, host)
        await _save_and_clone(vm, said, host)

        before = digest_tree(host / "project")
        await vm.upload_file(Path(__file__).with_name("escapes.py"), "/root/escapes.py")
        told = await said(
            f"cd / && python3 /root/escapes.py /workspace/project '/mnt/my data' {host}"
        )
    assert len(told.splitlines()) == 32, "each attempt has a line"
    assert SECRET not in told
    assert "a setuid file: own" in told, "such files can be made, in the guest's eyes"
    assert digest_tree(host / "project") == before
    assert (host / "secret").read_text() == SECRET
    assert not list(host.glob("x*"))
    for path in (host / "data").rglob("*"):
        status = path.lstat()
        assert stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or path.name == "out"
        assert status.st_uid == os.getuid()
        assert not status.st_mode & (stat.S_ISUID | stat.S_ISGID)


async def _change_an_overlay(said: Said) -> None:
    assert await said("cat a; ./tool; cat 'own link'; ls many | wc -l") == (
        f"the host'sbuilt\nthe host's{MANY}"
    )
    await said("echo mine >a; rm old; chmod 600 tool; mv 'own link' link; touch 'many/one more'")
    listed = f"mine\na\nlink\nmany\nout\npipe\ntool\n{MANY + 1}"
    assert await said("cat a; ls; ls many | wc -l") == listed
    user = "-c user.name=me -c user.email=me@here"
    await said(f"git init -q && git add a tool && git {user} commit -qm one && git status --short")
    await said("git clone -q . '/mnt/my data/clone' && rm -rf '/mnt/my data/clone'")
    await said("echo 'print(1)' >module.py && python3 -m compileall -q . && ls __pycache__")


async def _change_both_sides(said: Said, host: Path) -> None:
    data = host / "data"
    await said("cd '/mnt/my data'; mkdir d; echo new >d/one; mv d/one two; rmdir d; chmod 640 b")
    assert (data / "two").read_text() == "new\n"
    assert not (data / "d").exists()
    assert await said("cat '/mnt/my data/b'; stat -c %a '/mnt/my data/b'") == "before640"
    (data / "b").write_text("after, and longer")
    assert await said("cat '/mnt/my data/b'") == "after, and longer"
    (host / "project/later").write_text("from the host")
    assert await said("cat later") == "from the host"
    reading = asyncio.create_task(
        said(
            "exec 3<later; touch /run/open; until [ ! -e later ]; do sleep 0.1; done; cat <&3 || :"
        )
    )
    await said("until [ -e /run/open ]; do sleep 0.1; done")
    (host / "project/later").unlink()
    assert await reading in ("from the host", "")


async def _save_and_clone(vm: AsyncSmolVM, said: Said, host: Path) -> None:
    user = asyncio.create_task(vm.run("cd '/mnt/my data' && touch /run/in && sleep 1000"))
    await said("until [ -e /run/in ]; do sleep 0.1; done")
    with pytest.raises(SnapshotError, match="/mnt/my data is in use"):
        await vm.snapshot("busy")
    await said("pkill sleep")
    await user
    saving = asyncio.create_task(vm.snapshot("cancelled"))
    await vm.run("while mountpoint -q '/mnt/my data'; do sleep 0.1; done", check=True)
    saving.cancel()
    await asyncio.wait([saving])
    assert await said("cat a '/mnt/my data/two'") == "mine\nnew"

    async with vm.fork(mounts=[f"{host}/data:/workspace/project"]) as (clone,):
        listed = "ls '/mnt/my data' | wc -l; cat /workspace/project/two"
        assert (await clone.run(listed)).stdout == "0\nnew\n"
    assert await said("cat a '/mnt/my data/two'") == "mine\nnew"


async def test_a_directory_that_cannot_be_mounted_ends_the_vm_with_the_reason(
    debian: DebianImage, data_dir: Path, host: Path
) -> None:
    mounts = [f"{host}/project:/root/.bashrc/project"]
    with pytest.raises(MountError, match=r"/root/\.bashrc"):
        async with AsyncSmolVM(accel="tcg", data_dir=data_dir, mounts=mounts) as vm:
            await vm.wait_stopped()
