"""Processes that fork while they own a VM, or while they are attached to one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, VMCrashedError
from tests.conftest import vm_in
from tests.faults import forks

pytestmark = pytest.mark.anyio

# The exit status of each child, and 0 for the thread's, which just ends.
STATUSES = {
    **dict.fromkeys(forks.ENDINGS, 3),
    "an exception": 1,
    "the end of the block": 0,
    "a call in the forked coroutine": 3,
    "a daemon": 3,
    "a thread": 0,
}


@asynccontextmanager
async def forking(kind: str, image: Path, data_dir: Path) -> AsyncIterator[Any]:
    """A process that forks; see `forks.py`."""
    command = [sys.executable, "-m", "tests.faults.forks", kind, str(image), str(data_dir)]
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # its children may live on
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


async def check(process: Any) -> None:
    """Check what the process and its children tell."""
    out, error = await process.communicate()
    *children, vm = map(json.loads, out.splitlines())
    assert {child["child"]: child["status"] for child in children} == STATUSES, error.decode()
    assert "[]\n" in error.decode(), "a method of a child's VM did not tell of the fork"
    assert (vm["width"] > 0, vm["rung"]) == (True, "quit")
    assert process.returncode == 0


async def test_no_child_of_an_owner_harms_the_vm(blank_image: Path, data_dir: Path) -> None:
    async with forking("own", blank_image, data_dir) as process:
        await check(process)
        assert not list(data_dir.iterdir())


async def test_no_child_of_an_attached_process_harms_the_vm(
    blank_image: Path, data_dir: Path
) -> None:
    async with vm_in(data_dir, blank_image, vm_id="vm") as vm:
        async with forking("attach", blank_image, data_dir) as process:
            await check(process)
        await vm.wait_stopped()


async def test_under_uvloop_a_child_that_leaves_its_block_does_not_harm_the_vm(
    blank_image: Path, data_dir: Path
) -> None:
    async with forking("uvloop", blank_image, data_dir) as process:
        out, error = await process.communicate()
        told = json.loads(out)
        assert told["child"] in (3, -signal.SIGSEGV), error.decode()  # uvloop's copy can crash
        assert (told["width"] > 0, told["rung"]) == (True, "quit")
        assert process.returncode == 0
        assert not list(data_dir.iterdir())


async def test_an_attached_process_sees_the_death_of_an_owner_whose_child_lives(
    blank_image: Path, data_dir: Path
) -> None:
    async with forking("die", blank_image, data_dir) as process:
        vm = await attached(data_dir)
        process.stdin.write(b"\n")
        child = json.loads(await process.stdout.readline())["child"]
        process.kill()
        async with asyncio.timeout(60):
            with pytest.raises(VMCrashedError, match=r"its owner, process \d+, has died"):
                await vm.wait_stopped()
        assert os.path.exists(f"/proc/{child}")
        async with asyncio.timeout(60):  # a killed process closes its connections before it ends
            while (await AsyncSmolVM.list(data_dir=data_dir))[0].status != "orphaned":
                await asyncio.sleep(0.01)
        (pruned,) = await AsyncSmolVM.prune(data_dir=data_dir)
        assert pruned.status == "orphaned"


async def attached(data_dir: Path) -> AsyncSmolVM:
    """Attach as soon as the owner has started the VM."""
    async with asyncio.timeout(60):
        while not await AsyncSmolVM.list(data_dir=data_dir):
            await asyncio.sleep(0.01)
    return await AsyncSmolVM.from_id("vm", data_dir=data_dir)
