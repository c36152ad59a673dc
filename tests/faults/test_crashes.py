"""A crash of QEMU or swtpm: the block raises it, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from smolvm_async import (
    AsyncSmolVM,
    LaunchError,
    Rung,
    Status,
    VMCrashedError,
    VMNotRunningError,
)
from tests.conftest import FakeProgram, child_named, each_rung

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("process", "title", "number"),
    [
        ("swtpm", "swtpm ended: killed by SIGKILL", signal.SIGKILL),
        ("qemu", "QEMU ended: killed by SIGKILL", signal.SIGKILL),
        ("qemu", "ended from outside (host-signal). QEMU ended: exit status 0", signal.SIGTERM),
        ("swtpm", "swtpm ended: exit status 0", signal.SIGTERM),
    ],
)
async def test_a_process_that_is_killed_cancels_the_body_and_is_named(
    blank_image: Path, data_dir: Path, process: str, title: str, number: signal.Signals
) -> None:
    cancelled = False
    with pytest.raises(VMCrashedError) as raised:
        async with AsyncSmolVM(
            os="windows", image=blank_image, data_dir=data_dir, accel="tcg"
        ) as vm:
            events = vm.events()
            os.kill(child_named(process), number)
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled = True
                raise
    assert cancelled
    error = raised.value
    assert title in str(error)
    assert error.process.lower() == process
    assert error.returncode == (-signal.SIGKILL if "SIGKILL" in title else 0)
    assert error.log in str(error)
    assert error.console in str(error)
    assert vm.status is Status.DELETED
    async for _ in events:
        pass  # it ends
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_crash_is_raised_even_if_the_body_swallows_its_cancellation(
    blank_image: Path, data_dir: Path
) -> None:
    async def body(vm: AsyncSmolVM) -> None:
        async with vm:
            os.kill(child_named("qemu"), signal.SIGKILL)
            with contextlib.suppress(asyncio.CancelledError):  # swallowed, as some bodies do
                await asyncio.sleep(30)

    vm = AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg")
    with pytest.raises(VMCrashedError):
        await body(vm)


async def test_a_crash_that_the_body_itself_raises_comes_out_as_it_is(
    blank_image: Path, data_dir: Path
) -> None:
    with pytest.raises(VMCrashedError) as raised:
        async with AsyncSmolVM(
            os="windows", image=blank_image, data_dir=data_dir, accel="tcg"
        ) as vm:
            os.kill(child_named("qemu"), signal.SIGKILL)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(30)
            await vm.wait_stopped()
    assert raised.value.__cause__ is None


async def test_a_crash_behind_the_back_of_a_busy_loop_is_seen(
    blank_image: Path, data_dir: Path
) -> None:
    with pytest.raises(VMCrashedError, match="swtpm ended: killed by SIGKILL"):
        async with AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg"):
            pid = child_named("swtpm")
            os.kill(pid, signal.SIGKILL)
            while alive(pid):
                pass  # the event loop has no turn


async def test_a_refusal_of_qemu_is_not_blamed_on_swtpm(
    blank_image: Path, data_dir: Path, fake: FakeProgram
) -> None:
    fake(
        "qemu-system-x86_64",
        'exec $REAL "$@" -object memory-backend-ram,id=more,size=9999G,prealloc=on',
    )
    for _ in range(10):
        vm = AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg")
        with pytest.raises(LaunchError, match=r"start\. QEMU ended: exit status 1") as raised:
            await vm.start()
        assert "Cannot allocate memory" in str(raised.value)
        assert "swtpm ended" not in str(raised.value)


async def test_without_a_block_the_crash_is_raised_where_one_waits(
    blank_image: Path, data_dir: Path
) -> None:
    vm = AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg")
    await vm.start()
    waiting = asyncio.ensure_future(vm.wait_for("ready", timeout=60))
    await asyncio.sleep(0)
    os.kill(child_named("qemu"), signal.SIGKILL)
    with pytest.raises(VMCrashedError, match="SIGKILL"):
        await vm.wait_stopped()
    with pytest.raises(VMCrashedError):
        await waiting
    assert str(vm.status) == "crashed"
    assert (await vm.stop()).rung is Rung.CRASH
    assert not (data_dir / vm.vm_id / "tpm").exists()
    assert not (data_dir / vm.vm_id / "vars.fd").exists()
    await vm.start()  # a new run, from the image
    assert str(vm.status) == "running"
    await vm.delete()
    with pytest.raises(VMNotRunningError, match="deleted"):
        await vm.start()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("name", "script", "words", "returncode", "log"),
    [
        (
            "qemu-system-x86_64",
            "echo no such machine >&2; exit 3",
            ["exit status 3", "no such mac"],
            3,
            "no such machine",
        ),
        ("qemu-system-x86_64", "kill -SEGV $$", ["killed by SIGSEGV"], -signal.SIGSEGV, ""),
        (
            "swtpm",
            "echo state is locked >&2; exit 1",
            ["swtpm", "exit status 1", "state is locked"],
            1,
            "state is locked",
        ),
        (
            "qemu-system-x86_64",
            "exec sleep 60",
            ["did not answer within 0.5 s", "is still running"],
            None,
            "",
        ),
    ],
)
async def test_what_fails_to_start_is_told_with_status_command_and_log(
    blank_image: Path,
    data_dir: Path,
    tmp_path: Path,
    fake: FakeProgram,
    name: str,
    script: str,
    words: list[str],
    returncode: int | None,
    log: str,
) -> None:
    fake(name, script)
    vm = AsyncSmolVM(
        os="windows", image=blank_image, data_dir=data_dir, accel="tcg", timeouts={"launch": 0.5}
    )
    began = time.monotonic()
    with pytest.raises(LaunchError) as raised:
        await vm.start()
    assert time.monotonic() - began < 5
    for word in [*words, str(tmp_path / "bin" / name)]:
        assert word in str(raised.value)
    error = raised.value
    assert error.command[0] == str(tmp_path / "bin" / name)
    assert (error.returncode, error.log) == (returncode, log)
    assert not list(data_dir.iterdir())


async def test_a_qemu_that_ignores_everything_is_killed(blank_image: Path, data_dir: Path) -> None:
    timeouts = each_rung(0.2)
    vm = AsyncSmolVM(
        os="windows", image=blank_image, data_dir=data_dir, accel="tcg", timeouts=timeouts
    )
    await vm.start()
    os.kill(child_named("qemu"), signal.SIGSTOP)  # SIGKILL is all that a stopped process takes
    report = await vm.stop()
    assert report.rung is Rung.SIGKILL
    every_rung = list(Rung)[: list(Rung).index(Rung.SIGKILL) + 1]
    assert [step.rung for step in report.steps] == every_rung
    await vm.delete()
