"""Hosts and PID namespaces that share a data directory: nobody touches another host's VMs.

The other host is a process in namespaces of its own, with another host name and boot id. Locks that
are per host are emulated there: flock(2) always succeeds.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, Status, VMElsewhereError
from smolvm_async.foundation.process import identify
from smolvm_async.state.names import NEW_RECORD
from tests.integration.other_host import BOOT, NAMESPACE, in_namespace, on_host

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        subprocess.run([*NAMESPACE, "--uts", "hostname", "beta"], capture_output=True).returncode
        != 0,
        reason="this user may not make namespaces",
    ),
]

HERE = os.uname().nodename
ROUNDS = 6  # of a race


def names(directory: Path) -> set[str]:
    """Return the names of a VM's files; the owner may be replacing the record just now."""
    return set(os.listdir(directory)) - {NEW_RECORD}


def seen(infos: list[dict[str, Any]]) -> list[tuple[str, str, str | None]]:
    return [(info["vm_id"], info["status"], info["host"]) for info in infos]


@pytest.mark.parametrize("keep", [False, True])
async def test_another_host_sees_a_vm_and_cannot_touch_it(
    blank: dict[str, Any], data_dir: Path, tmp_path: Path, keep: bool
) -> None:
    async with on_host("beta", tmp_path, "--blind") as beta:
        async with AsyncSmolVM(**blank, vm_id="a", keep=keep) as vm:
            files = names(data_dir / "a")
            assert seen(await beta.call("show", data_dir)) == [("a", "elsewhere", HERE)]
            assert await beta.call("prune", data_dir) == []
            refusals = [
                await beta.call("find", data_dir, "a"),
                await beta.call("start", blank["image"], data_dir, "a", False),
            ]
            for refusal in refusals:
                assert (refusal["type"], refusal["host"]) == ("VMElsewhereError", HERE)
                assert f"--gone-host {HERE}" in refusal["hint"]
            assert await beta.call("start", blank["image"], data_dir, "b", False) == "running"
            infos = await AsyncSmolVM.list(data_dir=data_dir)
            assert [(info.vm_id, info.status, info.host) for info in infos] == [
                ("a", Status.RUNNING, None),
                ("b", Status.ELSEWHERE, "beta"),
            ]
            assert await AsyncSmolVM.prune(data_dir=data_dir) == []
            assert await beta.call("stop", "b") == "quit"
            await beta.call("delete", "b")
            assert vm.status is Status.RUNNING
            assert names(data_dir / "a") == files
        if keep:
            assert await beta.call("boot", data_dir, "a") == "running"
            with pytest.raises(VMElsewhereError, match="belongs to host 'beta'"):
                await vm.start()
            with pytest.raises(VMElsewhereError, match="belongs to host 'beta'"):
                await vm.delete()
            assert await beta.call("stop", "a") == "quit"
            await vm.start()
            await vm.delete()
    assert not list(data_dir.iterdir())


async def test_the_command_line_shows_the_host_and_refuses(
    blank: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "smolvm_async", *words, "--data-dir", str(data_dir)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    async with on_host("beta", tmp_path) as beta:
        await beta.call("start", blank["image"], data_dir, "b", True)
        (info,) = json.loads((await asyncio.to_thread(cli, "list", "--json")).stdout)
        assert (info["status"], info["host"]) == ("elsewhere", "beta")
        for words in (("stop", "b"), ("delete", "b", "--yes")):
            refused = await asyncio.to_thread(cli, *words)
            assert refused.returncode == 2
            assert "belongs to host 'beta'" in refused.stderr
        await beta.kill()
    shown = await asyncio.to_thread(cli, "prune", "--gone-host", "beta")
    assert "b is kept; its status is now stopped." in shown.stdout
    await (await AsyncSmolVM.from_id("b", data_dir=data_dir)).delete()


async def test_the_vms_of_a_host_that_died_wait_until_it_is_declared_gone(
    blank: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    async with on_host("beta", tmp_path) as beta:
        await beta.call("start", blank["image"], data_dir, "kept", True)
        await beta.call("start", blank["image"], data_dir, "other", False)
    for gone_host in (None, "gamma"):
        assert not await AsyncSmolVM.prune(data_dir=data_dir, gone_host=gone_host)
    with pytest.raises(VMElsewhereError):
        await AsyncSmolVM.from_id("kept", data_dir=data_dir)
    pruned = await AsyncSmolVM.prune(data_dir=data_dir, gone_host="beta")
    assert [(info.vm_id, info.status) for info in pruned] == [
        ("kept", Status.ELSEWHERE),
        ("other", Status.ELSEWHERE),
    ]
    async with await AsyncSmolVM.from_id("kept", data_dir=data_dir) as vm:
        assert vm.status is Status.RUNNING
    await vm.delete()
    assert not list(data_dir.iterdir())


async def test_two_hosts_that_start_one_kept_vm_at_once_start_it_once(
    blank: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    async with AsyncSmolVM(**blank, vm_id="a", keep=True):
        pass
    async with (
        on_host("beta", tmp_path, "--blind") as beta,
        on_host("gamma", tmp_path, "--blind") as gamma,
    ):
        for _ in range(ROUNDS):
            answers = await asyncio.gather(
                beta.call("boot", data_dir, "a"), gamma.call("boot", data_dir, "a")
            )
            refusals = [answer for answer in answers if answer != "running"]
            assert [refusal["type"] for refusal in refusals] == ["VMElsewhereError"]
            winner = beta if answers[0] == "running" else gamma
            assert await winner.call("stop", "a") == "quit"
        assert seen(await gamma.call("show", data_dir)) == [("a", "stopped", None)]
    await (await AsyncSmolVM.from_id("a", data_dir=data_dir)).delete()


async def test_another_pid_namespace_sees_a_running_vm_and_attaches(
    blank: dict[str, Any], data_dir: Path
) -> None:
    async with in_namespace() as other, AsyncSmolVM(**blank, vm_id="a") as vm:
        assert seen(await other.call("show", data_dir)) == [("a", "running", None)]
        assert await other.call("prune", data_dir) == []
        assert await other.call("find", data_dir, "a") == "running"
        await other.call("stop", "a")
        await vm.wait_stopped()


@pytest.mark.parametrize("proc", [("--mount-proc",), ()], ids=["own /proc", "/proc of the parent"])
async def test_an_owner_in_another_pid_namespace_runs_until_it_dies(
    blank: dict[str, Any], data_dir: Path, proc: tuple[str, ...]
) -> None:
    namespace = ("unshare", "--pid", "--fork", "--kill-child", *proc)
    async with in_namespace(namespace=namespace) as other:
        assert await other.call("start", blank["image"], data_dir, "a", False) == "running"
        assert seen(await other.call("show", data_dir)) == [("a", "running", None)]
        (info,) = await AsyncSmolVM.list(data_dir=data_dir)
        assert info.status is Status.RUNNING
        assert not await AsyncSmolVM.prune(data_dir=data_dir)
        vm = await AsyncSmolVM.from_id("a", data_dir=data_dir)
        assert vm.status is Status.RUNNING
        await vm.detach()
        await other.kill()
        async with asyncio.timeout(30):  # until the namespace's last process has ended
            while not (pruned := await AsyncSmolVM.prune(data_dir=data_dir)):
                await asyncio.sleep(0.05)
    assert [info.status for info in pruned] == [Status.ORPHANED]
    assert not list(data_dir.iterdir())


async def test_after_a_reboot_a_vm_is_an_orphan_whatever_process_has_its_ids(
    blank: dict[str, Any], data_dir: Path
) -> None:
    async with AsyncSmolVM(**blank, vm_id="a", keep=True):
        record = json.loads((data_dir / "a" / "vm.json").read_text())
    bystander = subprocess.Popen(["sleep", "600"], cwd=data_dir / "a")
    try:
        identity = identify(bystander.pid)
        record |= {"owner": identity, "processes": {"QEMU": identity}}
        record["host"][2] = BOOT
        (data_dir / "a" / "vm.json").write_text(json.dumps(record))
        assert [info.status for info in await AsyncSmolVM.list(data_dir=data_dir)] == ["orphaned"]
        assert len(await AsyncSmolVM.prune(data_dir=data_dir)) == 1
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    async with await AsyncSmolVM.from_id("a", data_dir=data_dir) as vm:
        assert vm.status is Status.RUNNING
    await vm.delete()


async def test_a_kept_vm_of_a_version_that_recorded_no_host_starts(
    blank: dict[str, Any], data_dir: Path
) -> None:
    async with AsyncSmolVM(**blank, vm_id="a", keep=True) as vm:
        pass
    path = data_dir / "a" / "vm.json"
    record = json.loads(path.read_text())
    del record["host"]
    path.write_text(json.dumps(record))
    async with await AsyncSmolVM.from_id("a", data_dir=data_dir) as vm:
        assert vm.status is Status.RUNNING
    await vm.delete()
