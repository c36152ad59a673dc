"""A VM that one process owns and others attach to, seen from both sides."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from smolvm_async import (
    AsyncSmolVM,
    BootState,
    ConfigError,
    ConnectionLostError,
    Rung,
    Status,
    VMCrashedError,
    VMNotFoundError,
    VMNotRunningError,
    VMTimeoutError,
)
from smolvm_async.foundation.process import identify
from smolvm_async.images.build.debian import DebianImage
from tests.conftest import BOOT, children, vm_in

pytestmark = pytest.mark.anyio

OWNER = """
import asyncio, json, sys
from smolvm_async import AsyncSmolVM

async def main():
    image, data_dir, keep = sys.argv[1:]
    vm = AsyncSmolVM(os="windows", image=image, memory=2048, accel="tcg", data_dir=data_dir,
                     vm_id="shared", keep=keep == "keep")
    async with vm:
        print("running", flush=True)
        await vm.wait_stopped()
        print(vm.status, flush=True)
    print("left", flush=True)

asyncio.run(main())
"""


@asynccontextmanager
async def owner(
    image: Path, data_dir: Path, keep: str = ""
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process that runs the VM `shared`."""
    arguments = [sys.executable, "-c", OWNER, str(image), str(data_dir), keep]
    process = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"running\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def shared(image: Path, data_dir: Path) -> AsyncSmolVM:
    return vm_in(data_dir, image, vm_id="shared")


async def test_a_guest_that_shuts_itself_down_is_no_crash_on_either_side(
    debian: DebianImage, data_dir: Path
) -> None:
    machine = AsyncSmolVM(vm_id="shared", boot="cold", accel="tcg", data_dir=data_dir)
    async with machine as owned:
        vm = await AsyncSmolVM.from_id("shared", data_dir=data_dir)
        assert vm.status is Status.RUNNING
        assert vm.accelerator == "tcg"
        assert vm.boot_state is BootState.FIRMWARE
        events = vm.events()
        reached = await vm.wait_for("operating_system", timeout=BOOT)
        assert "PM1_EN" in reached.evidence
        with pytest.raises(ConnectionLostError):
            await vm.run("poweroff; exec sleep 1000", timeout=BOOT)
        await vm.wait_stopped()
        assert "Power down" in vm.console_log()
        names = [event.name async for event in events]
        assert {"BOOT_STATE", "SHUTDOWN"} <= {*names}
        await owned.wait_stopped()
        for side in (owned, vm):
            assert side.status is Status.STOPPED
            with pytest.raises(VMNotRunningError, match="ended by 'guest'"):
                await side.wait_for("firmware")
            assert (await side.stop()).rung is Rung.GUEST
    assert not list(data_dir.iterdir())


async def test_leaving_the_block_detaches_and_the_vm_goes_on(
    blank_image: Path, data_dir: Path
) -> None:
    async with shared(blank_image, data_dir) as vm:
        async with await AsyncSmolVM.from_id("shared", data_dir=data_dir) as first:
            second = await AsyncSmolVM.from_id("shared", data_dir=data_dir)
            assert second.vm_id == first.vm_id == "shared"
        assert vm.status is Status.RUNNING
        with pytest.raises(VMNotRunningError, match="detached"):
            await first.stop()
        with pytest.raises(ZeroDivisionError):
            async with second:
                raise ZeroDivisionError
        assert vm.status is Status.RUNNING
        await first.start()  # attaches again
        assert first.status is Status.RUNNING
        await first.detach()
        with pytest.raises(ConfigError, match="keep=True"):
            await vm.detach()
        assert vm.status is Status.RUNNING


async def test_what_one_has_detached_from_is_not_said_to_have_ended(
    blank_image: Path, data_dir: Path
) -> None:
    async with shared(blank_image, data_dir) as vm:
        other = await AsyncSmolVM.from_id("shared", data_dir=data_dir)
        waiting = asyncio.ensure_future(other.wait_for("ready", timeout=30))
        await asyncio.sleep(0)
        await other.detach()
        for outcome in (waiting, other.wait_for("ready"), other.wait_stopped()):
            with pytest.raises(VMNotRunningError, match="this process has detached from the VM"):
                await outcome
        assert vm.status is Status.RUNNING


async def test_the_events_of_an_attached_vm_end_with_it_even_if_only_they_are_held(
    blank_image: Path, data_dir: Path
) -> None:
    async with shared(blank_image, data_dir) as vm:
        events = (await AsyncSmolVM.from_id("shared", data_dir=data_dir)).events()
        gc.collect()
        await vm.stop(timeout=0)
        async with asyncio.timeout(10):
            assert "SHUTDOWN" in [event.name async for event in events]


@pytest.mark.parametrize("keep", ["", "keep"])
async def test_an_attached_process_can_stop_it(
    blank_image: Path, data_dir: Path, keep: str
) -> None:
    async with owner(blank_image, data_dir, keep) as process:
        vm = await AsyncSmolVM.from_id("shared", data_dir=data_dir)
        report = await vm.stop(timeout=0)
        assert report.rung is Rung.QUIT
        assert report.exit_status == 0
        assert report.steps[0].seconds > 0
        assert vm.status is Status.STOPPED
        assert (await process.communicate())[0] == b"stopped\nleft\n"
        with pytest.raises(VMNotRunningError, match="quit"):
            await vm.wait_for("ready")
    if keep:
        await vm.start()  # it is ours now
        assert len(children()) == 2
        await vm.delete()
    assert not list(data_dir.iterdir())


@pytest.mark.parametrize("keep", ["", "keep"])
async def test_an_attached_process_can_delete_it(
    blank_image: Path, data_dir: Path, keep: str
) -> None:
    async with owner(blank_image, data_dir, keep) as process:
        vm = await AsyncSmolVM.from_id("shared", data_dir=data_dir)
        await vm.delete()
        assert vm.status is Status.DELETED
        assert not list(data_dir.iterdir())
        assert (await process.communicate())[0] == b"deleted\nleft\n"
        assert process.returncode == 0


async def test_one_that_was_attached_can_delete_what_the_owner_keeps(
    blank_image: Path, data_dir: Path
) -> None:
    async with owner(blank_image, data_dir, "keep") as process:
        first = await AsyncSmolVM.from_id("shared", data_dir=data_dir)
        second = await AsyncSmolVM.from_id("shared", data_dir=data_dir)
        await first.stop(timeout=0)
        await process.communicate()
    await second.wait_stopped()
    await second.delete()
    assert not list(data_dir.iterdir())
    await first.delete()  # it is gone already
    assert first.status is Status.DELETED


async def test_a_crash_cancels_the_attached_block_too(blank_image: Path, data_dir: Path) -> None:
    async with owner(blank_image, data_dir) as process:
        threads = Path(f"/proc/{process.pid}/task").glob("*/children")
        pids = [pid for thread in threads for pid in thread.read_text().split()]
        with pytest.raises(VMCrashedError, match="ended: killed by SIGKILL") as raised:
            async with await AsyncSmolVM.from_id("shared", data_dir=data_dir):
                os.kill(int(pids[0]), signal.SIGKILL)
                await asyncio.sleep(30)
        assert raised.value.process in ("QEMU", "swtpm")
        assert raised.value.returncode == -signal.SIGKILL
        await process.communicate()


async def test_an_owner_that_is_killed_is_a_crash_and_its_vm_an_orphan(
    blank_image: Path, data_dir: Path
) -> None:
    async with owner(blank_image, data_dir) as process:
        with pytest.raises(VMCrashedError, match=f"process {process.pid}, has died") as raised:
            async with await AsyncSmolVM.from_id("shared", data_dir=data_dir) as vm:
                process.kill()
                await asyncio.sleep(30)
        assert raised.value.process == "owner"
        assert vm.status is Status.ORPHANED
        await process.communicate()
    (info,) = await AsyncSmolVM.list(data_dir=data_dir)
    assert (info.status, info.owner) == ("orphaned", None)
    (pruned,) = await AsyncSmolVM.prune(data_dir=data_dir)
    assert pruned.vm_id == "shared"
    assert not list(data_dir.iterdir())


async def test_a_forked_child_of_a_dead_owner_does_not_hold_its_vms(
    blank_image: Path, data_dir: Path
) -> None:
    script = OWNER.replace(
        'print("running", flush=True)',
        "import os, time\n        here, there = os.pipe()\n"
        "        if not os.fork():\n            os.write(there, b'!')\n"
        "            time.sleep(600)\n"
        "        os.read(here, 1)  # the child has let go of what it does not own\n"
        '        print("running", os.getpid(), flush=True)',
    )
    arguments = [sys.executable, "-c", script, str(blank_image), str(data_dir), ""]
    process = await asyncio.create_subprocess_exec(
        *arguments, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    await process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(10):
            while identify(process.pid):  # wait() would wait for the child's pipe, too
                await asyncio.sleep(0.01)
        (pruned,) = await AsyncSmolVM.prune(data_dir=data_dir)
        assert pruned.status == "orphaned"
        assert not list(data_dir.iterdir())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    await process.communicate()


async def test_an_attached_process_that_is_killed_harms_nothing(
    blank_image: Path, data_dir: Path
) -> None:
    script = (
        "import asyncio, sys\n"
        "from smolvm_async import AsyncSmolVM\n"
        "async def main():\n"
        "    vm = await AsyncSmolVM.from_id('shared', data_dir=sys.argv[1])\n"
        "    print(vm.status, flush=True)\n"
        "    await vm.wait_stopped()\n"
        "asyncio.run(main())\n"
    )
    async with shared(blank_image, data_dir) as vm:
        arguments = [sys.executable, "-c", script, str(data_dir)]
        other = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
        assert other.stdout is not None
        assert await other.stdout.readline() == b"running\n"
        other.kill()
        await other.communicate()
        async with await AsyncSmolVM.from_id("shared", data_dir=data_dir) as another:
            with pytest.raises(VMTimeoutError, match="did not reach 'ready'"):
                await another.wait_for("ready", timeout=0.1)
        assert vm.status is Status.RUNNING


async def test_one_that_reads_nothing_does_not_hold_up_the_owner(
    debian: DebianImage, data_dir: Path
) -> None:
    vm = AsyncSmolVM(vm_id="shared", accel="tcg", data_dir=data_dir)
    await vm.start()
    _, writer = await asyncio.open_unix_connection(str(data_dir / "shared" / "control.sock"))
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await vm.run("yes flood </dev/null >/dev/ttyS0 2>&1 &", check=True, timeout=BOOT)
    async with asyncio.timeout(BOOT):
        while vm.console_log().count("flood") < 10_000:
            await asyncio.sleep(0.1)
    assert len(vm.console_log()) <= 256 * 1024
    async with asyncio.timeout(30):
        assert (await vm.stop(timeout=0)).rung is Rung.QUIT
    writer.transport.abort()
    await vm.delete()


@pytest.mark.parametrize(
    "line",
    [b"\n", b"nonsense\n", b"[]\n", b'{"method": "rm"}\n', b'{"id": 1}\n', b"\xff\n", b"x" * 70000],
)
async def test_nonsense_on_the_control_socket_harms_nothing(
    blank_image: Path, data_dir: Path, line: bytes
) -> None:
    async with shared(blank_image, data_dir) as vm:
        reader, writer = await asyncio.open_unix_connection(
            str(data_dir / "shared" / "control.sock")
        )
        assert json.loads(await reader.readline())["method"] == "hello"
        writer.write(line)
        if line.endswith(b'"}\n') or line.startswith(b'{"id'):
            async with asyncio.timeout(10):
                while "error" not in json.loads(await reader.readline()):
                    pass
        writer.transport.abort()
        assert vm.status is Status.RUNNING
        async with await AsyncSmolVM.from_id("shared", data_dir=data_dir) as other:
            assert other.status is Status.RUNNING


HOSTILE = (
    *("__class__", "__init__", "stop.__globals__", "screen.__class__", "screen.dump.__func__"),
    *("screen._dump", "screen.open", "input._monitor", "input.on_event", "screen.input.post"),
    *("peripherals", "peripherals.screen.dump", "run", "run.stop", "run.abort", "_kill", "_server"),
    *("config", "hub", "leave", "detach", "on_crash", "self", "vm.stop", "console.feed"),
)


async def test_only_what_is_marked_can_be_called_over_the_control_socket(
    blank_image: Path, data_dir: Path
) -> None:
    requests = [
        *({"id": 1, "method": name} for name in (*HOSTILE, "", None, 7, ["stop"], {"stop": 1})),
        {"id": 1, "method": "stop", "params": {"self": None, "timeout": 0}},
        {"id": 1, "method": "stop", "params": {"timeout": 0, "more": 1}},
        {"id": 1, "method": "stop", "params": {"timeout": "soon"}},
        {"id": 1, "method": "stop", "params": {"timeout": -1}},
        {"id": 1, "method": "stop", "params": {}},
        {"id": 1, "method": "stop", "params": [0]},
        {"id": 1, "method": "vnc.start", "params": {"kind": "everywhere"}},
        {"id": 1, "method": "input.post", "params": {"events": "a"}},
    ]
    async with shared(blank_image, data_dir) as vm:
        path = str(data_dir / "shared" / "control.sock")
        reader, writer = await asyncio.open_unix_connection(path)
        for request in requests:
            writer.write(json.dumps(request).encode() + b"\n")
            async with asyncio.timeout(10):
                while "id" not in (answer := json.loads(await reader.readline())):
                    pass
            assert "error" in answer, request
        writer.close()
        await writer.wait_closed()
        assert vm.status is Status.RUNNING


async def test_an_owner_with_another_protocol_is_told(
    blank_image: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shared(blank_image, data_dir) as vm:
        monkeypatch.setattr("smolvm_async.vm.attach.server.PROTOCOL", 1)
        with pytest.raises(VMNotRunningError, match=r"runs smolvm_async .* Use the same version"):
            await AsyncSmolVM.from_id("shared", data_dir=data_dir)
        assert vm.status is Status.RUNNING


async def test_an_unknown_id_is_told_and_a_wrong_one_refused(data_dir: Path) -> None:
    with pytest.raises(VMNotFoundError, match="no VM with vm_id='nobody' exists in"):
        await AsyncSmolVM.from_id("nobody", data_dir=data_dir)
    with pytest.raises(ConfigError, match="vm_id="):
        await AsyncSmolVM.from_id("../etc", data_dir=data_dir)
    assert await AsyncSmolVM.list(data_dir=data_dir) == []
    assert await AsyncSmolVM.prune(data_dir=data_dir) == []
    assert not data_dir.exists()


async def test_list_tells_all_there_is(blank_image: Path, data_dir: Path) -> None:
    async with shared(blank_image, data_dir) as vm:
        (info,) = await AsyncSmolVM.list(data_dir=data_dir)
        assert info.vm_id == vm.vm_id
        assert (info.os, info.memory, info.keep) == ("windows", 2048, False)
        assert (info.status, info.owner) == ("running", os.getpid())
        assert 0 < info.age < 600
        assert info.image == str(blank_image)
        assert await AsyncSmolVM.prune(data_dir=data_dir) == []  # it lives
        await vm.stop(timeout=0)
        assert (await AsyncSmolVM.list(data_dir=data_dir))[0].status == "stopped"
        with pytest.raises(VMNotRunningError, match="has not deleted it yet"):
            await AsyncSmolVM.from_id("shared", data_dir=data_dir)


async def test_a_path_longer_than_a_sockets_address_will_do(
    blank_image: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data" / ("x" * 200)
    async with (
        shared(blank_image, data_dir),
        await AsyncSmolVM.from_id("shared", data_dir=data_dir) as other,
    ):
        assert other.status is Status.RUNNING
    data_dir.rmdir()
