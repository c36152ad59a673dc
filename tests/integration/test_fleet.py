"""Fleets of real VMs, most without an operating system; `map()` itself is a unit test."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import (
    AsyncSmolVM,
    CommandFailedError,
    ConfigError,
    Fleet,
    HostError,
    ImageError,
    LaunchError,
    Limits,
    MemberFailedError,
    VMCrashedError,
    VMNotRunningError,
)
from smolvm_async.config.options import VMOptions
from smolvm_async.fleet import memory
from smolvm_async.fleet.member import Member
from smolvm_async.foundation import process
from smolvm_async.host.accelerator import OVERHEAD
from smolvm_async.host.memory import Memory
from smolvm_async.images import qcow2
from tests.conftest import processes

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(100, func_only=True)]

Template = VMOptions


@pytest.fixture(autouse=True)
def nothing_promised(data_dir: Path) -> Any:
    """Check after each test that no memory is promised and no VM is left."""
    yield
    assert not memory.PROMISES._promises
    assert not data_dir.exists() or not [*data_dir.iterdir()]


def qemu_of(vm: AsyncSmolVM) -> int:
    """Return the process id of the VM's QEMU."""
    found = processes(vm._vm.config.data_dir / vm.vm_id)
    (pid,) = [pid for pid, name in found.items() if name.startswith("qemu")]
    return pid


async def ident(vm: AsyncSmolVM, item: Any) -> tuple[Any, str]:
    assert str(vm.status) == "running"
    return item, vm.vm_id


async def test_all_are_handed_over_as_they_become_ready(blank: Template, data_dir: Path) -> None:
    async with Fleet(blank, size=5, until="firmware", max_booting=2) as fleet:
        seen = [vm async for vm in fleet]
        assert len({vm.vm_id for vm in seen}) == 5
        assert {str(vm.status) for vm in seen} == {"running"}
        assert [vm async for vm in fleet] == []
        assert {vm.vm_id for vm in await fleet.all_ready()} == {vm.vm_id for vm in seen}
        status = fleet.status()
        assert (status.ready, status.waiting, status.failed) == (5, 0, 0)
        assert {member.state for member in status.members} == {"firmware"}
        assert len(await AsyncSmolVM.list(data_dir=data_dir)) == 5
    assert fleet.status().deleted == 5
    with pytest.raises(VMNotRunningError):
        await seen[0].pause()


async def test_a_place_is_free_again_when_its_vm_is_deleted(blank: Template) -> None:
    async with Fleet(blank, size=5, max_live=2, until="firmware") as fleet:
        with pytest.raises(ConfigError, match="max_live=2"):
            await fleet.all_ready()
        count = most = 0
        async for vm in fleet:
            count += 1
            status = fleet.status()
            most = max(most, status.ready + status.booting)
            waiting = [member for member in status.members if member.state == "waiting"]
            assert all(member.waits_for for member in waiting)
            await vm.delete()
        assert (count, most) == (5, 2)


async def test_an_image_that_vanishes_fails_the_fleet_and_names_the_vms(
    blank: Template, blank_image: Path, tmp_path: Path
) -> None:
    image = tmp_path / "short-lived.qcow2"
    shutil.copy(blank_image, image)
    fleet = Fleet({**blank, "image": image}, size=4, until="firmware", max_booting=1)
    with pytest.raises(ExceptionGroup) as caught:
        async with fleet:
            async for _ in fleet:
                image.unlink(missing_ok=True)
    failures = caught.value.exceptions
    assert failures
    for failure in failures:
        assert isinstance(failure, MemberFailedError)
        assert failure.vm_id in str(failure)
        assert isinstance(failure.__cause__, ImageError)
    with pytest.raises(ImageError):
        Fleet({**blank, "image": image})


async def test_a_vm_that_dies_cancels_the_block(blank: Template) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with Fleet(blank, size=6, until="firmware") as fleet:
            async for vm in fleet:  # while the others boot
                os.kill(qemu_of(vm), signal.SIGKILL)
                await asyncio.sleep(1000)
    assert vm.vm_id in {error.vm_id for error in caught.value.exceptions}  # type: ignore[union-attr]
    assert isinstance(caught.value.exceptions[0].__cause__, VMCrashedError | LaunchError)


async def test_a_vm_that_dies_is_collected(blank: Template) -> None:
    async with Fleet(blank, size=3, until="firmware", on_error="collect") as fleet:
        first, *others = await fleet.all_ready()
        os.kill(qemu_of(first), signal.SIGKILL)
        while not fleet.failures:
            await asyncio.sleep(0.01)
        assert [failure.vm_id for failure in fleet.failures] == [first.vm_id]
        assert {str(vm.status) for vm in others} == {"running"}


@pytest.mark.parametrize("mapping", [False, True])
async def test_a_fleet_that_is_cancelled_anywhere_leaves_nothing(
    blank: Template, data_dir: Path, mapping: bool
) -> None:
    async def use() -> None:
        async with Fleet(blank, size=3, until="firmware") as fleet:
            if mapping:
                async for _ in fleet.map(ident, range(4)):
                    pass
            else:
                await fleet.all_ready()

    step = 0
    while True:
        using = asyncio.ensure_future(use())
        for _ in range(step):
            await asyncio.sleep(0)
        if not using.cancel():
            break
        with pytest.raises(asyncio.CancelledError):
            await using
        assert not data_dir.exists() or not [*data_dir.iterdir()]
        assert not memory.PROMISES._promises
        step += 29 + step // 2
    await using
    assert step > 100


async def test_memory_is_promised_once_between_two_fleets(
    blank: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's memory is pretended: two VMs fit into it."""
    room = 2 * (128 + OVERHEAD)
    monkeypatch.setattr(memory.PROMISES, "_look", lambda: Memory(0, room))
    monkeypatch.setattr(Member, "_resident", lambda _: 0)
    with pytest.raises(HostError, match="enough for 2"):
        await Fleet(blank, size=3, until="firmware").__aenter__()
    peaks: list[int] = []

    async def job(vm: AsyncSmolVM, item: int) -> None:
        peaks.append(sum(fleet.status().ready for fleet in fleets))
        assert sum(promise.size for promise in memory.PROMISES._promises) <= room

    async def drain(fleet: Fleet) -> None:
        async for _ in fleet.map(job, range(5)):
            pass

    fleets = [Fleet(blank, until="firmware", max_booting=8) for _ in range(2)]
    async with fleets[0], fleets[1]:
        await asyncio.gather(*map(drain, fleets))
    assert len(peaks) == 10
    assert max(peaks) <= 2


async def test_what_all_have_in_common_is_looked_at_once(
    blank: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sector of a compressed disk is for qemu-img to read."""
    image = tmp_path / "compressed.qcow2"
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xf4" * 512 + bytes(1 << 20))
    convert = ["qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", str(disk), str(image)]
    subprocess.run(convert, check=True)
    asked: list[Path] = []
    looked: list[int] = []

    async def run(command: Sequence[str | Path], *, fds: Sequence[int]) -> str:
        asked.append(Path(command[0]))
        return await process.run(command, fds=fds)

    def check(fd: int) -> qcow2.Header:
        looked.append(fd)
        return checked(fd)

    checked = qcow2.check
    monkeypatch.setattr("smolvm_async.images.local.run", run)
    monkeypatch.setattr("smolvm_async.images.qcow2.check", check)
    monkeypatch.setattr("smolvm_async.images.local.SETTLED", 0)
    async with Fleet({**blank, "image": image}, size=3, until="firmware") as fleet:
        for vm in await fleet.all_ready():
            assert b"pflash" not in Path(f"/proc/{qemu_of(vm)}/cmdline").read_bytes()
        results = [item async for item, _ in fleet.map(ident, range(4))]
    assert sorted(results) == [0, 1, 2, 3]
    assert [path.name for path in asked] == ["qemu-img"]
    assert len(looked) == 1


async def test_two_fleets_that_fail_at_once_are_both_told_of(blank: Template) -> None:
    for _ in range(2):
        with pytest.raises(ExceptionGroup) as caught:
            async with (
                Fleet(blank, size=2, until="firmware") as outer,
                Fleet(blank, size=2, until="firmware") as inner,
            ):
                vms = [vm for fleet in (outer, inner) for vm in await fleet.all_ready()]
                for vm in (vms[0], vms[2]):
                    os.kill(qemu_of(vm), signal.SIGKILL)
                await asyncio.sleep(1000)
        current = asyncio.current_task()
        assert current is not None
        assert not current.cancelling()
        told = "".join(traceback.format_exception(caught.value))
        assert vms[0].vm_id in told or vms[2].vm_id in told


async def test_each_vm_is_handed_over_once(blank: Template) -> None:
    async with Fleet(blank, size=6, until="firmware") as fleet:
        seen: list[AsyncSmolVM] = []

        async def take() -> None:
            async for vm in fleet:
                assert str(vm.status) == "running"
                seen.append(vm)
                await asyncio.sleep(0)
                if len(seen) == 2:  # those that map() takes are nobody else's
                    results = fleet.map(ident, range(2), in_order=True)
                    assert [item async for item, _ in results] == [0, 1]

        await asyncio.gather(take(), take())
        assert len({vm.vm_id for vm in seen}) == len(seen) <= 6


async def test_a_vm_that_has_died_is_not_handed_over(blank: Template) -> None:
    async with Fleet(blank, size=3, until="firmware", on_error="collect") as fleet:
        seen: list[AsyncSmolVM] = []
        async for vm in fleet:
            seen.append(vm)
            if len(seen) == 1:
                while fleet.status().ready < 3:
                    await asyncio.sleep(0.01)
                for member in fleet._members:
                    if member.vm is not vm:
                        os.kill(qemu_of(member.vm), signal.SIGKILL)
                while fleet.status().failed < 2:
                    await asyncio.sleep(0.01)
        assert len(seen) == 1


@pytest.mark.parametrize("end", ["stop", "kill", "pause"])
async def test_a_vm_that_no_longer_runs_is_not_used_again(blank: Template, end: str) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> str:
        assert str(vm.status) == "running"
        if end == "stop":
            await vm.stop()
        elif end == "kill":
            os.kill(qemu_of(vm), signal.SIGKILL)
        else:
            await vm.pause()
        return vm.vm_id

    async with Fleet(blank, size=2, until="firmware") as fleet:
        vm_ids = [vm_id async for vm_id in fleet.map(job, range(6), reuse=True)]
    assert len(set(vm_ids)) == 6


async def test_max_memory_of_the_limits_bounds_a_fleet(blank: Template) -> None:
    limited: VMOptions = {**blank, "limits": Limits(max_memory=300)}
    with pytest.raises(HostError, match=r"enough for 2.*max_live=2"):
        await Fleet(limited, size=3, until="firmware").__aenter__()
    async with Fleet(limited, until="firmware") as fleet:
        results = [item async for item, _ in fleet.map(ident, range(6))]
    assert sorted(results) == [*range(6)]


async def test_a_vm_that_can_never_fit_holds_up_nobody(blank: Template) -> None:
    huge: VMOptions = {**blank, "memory": memory.PROMISES.capacity() + 1024}
    async with Fleet(blank, size=1, until="firmware") as fleet:
        await fleet.all_ready()
        with pytest.raises(HostError, match=r"1 VM of .* cannot run at once: .* smaller memory="):
            await Fleet(huge, until="firmware").__aenter__()
        results = [item async for item, _ in fleet.map(ident, range(2))]
        assert sorted(results) == [0, 1]


async def test_a_vm_that_map_uses_is_not_handed_over(blank: Template) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> str:
        taken.append(vm)
        await go_on.wait()
        return vm.vm_id

    taken: list[AsyncSmolVM] = []
    go_on = asyncio.Event()
    async with Fleet(blank, size=3, until="firmware") as fleet:
        doing = asyncio.ensure_future(anext(fleet.map(job, [1])))
        while not taken:
            await asyncio.sleep(0.01)
        others = await fleet.all_ready()
        assert len(others) == 2
        assert taken[0] not in others
        go_on.set()
        assert await doing == taken[0].vm_id


async def test_map_is_refused_where_it_would_wait_forever(blank: Template) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> Any:
        return [result async for result in fleet.map(ident, [item])]

    async with Fleet(blank, size=2, max_live=2, until="firmware") as fleet:
        early = fleet.map(ident, range(2))
        vm, _ = await fleet.all_ready()
        for refused in (early, None):
            with pytest.raises(ConfigError, match="cannot start a VM: all 2"):
                await anext(refused or fleet.map(ident, [1]))
        await vm.delete()
        assert [item async for item, _ in fleet.map(ident, [1])] == [1]
        with pytest.raises(ExceptionGroup) as caught:
            await anext(fleet.map(job, [1]))
        assert "called by a job" in str(caught.value.exceptions[0])


async def test_the_rest_of_a_map_ends_with_the_block(blank: Template) -> None:
    async with Fleet(blank, until="firmware", max_live=2) as fleet:
        assert fleet.status().members == ()
        results = fleet.map(ident, itertools.count(), reuse=True)
        async for _ in results:
            break
    assert fleet.status().ready == 0
    with pytest.raises(ConfigError, match="iterate inside the block"):
        async for _ in results:  # those that were queued before the block ended
            pass
    with pytest.raises(ConfigError, match="does not run"):
        fleet.map(ident, range(3))
    with pytest.raises(ConfigError, match="make a new Fleet"):
        await fleet.__aenter__()


@pytest.mark.parametrize("end", ["crash", "delete"])
async def test_only_a_crash_is_a_jobs_failure(blank: Template, end: str) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> str:
        if end == "crash":
            os.kill(qemu_of(vm), signal.SIGKILL)
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)
        else:
            await vm.delete()
            await asyncio.sleep(0.05)
        return "done"

    async with Fleet(blank, until="firmware") as fleet:
        results = fleet.map(job, [1])
        if end == "crash":
            with pytest.raises(ExceptionGroup) as caught:
                await anext(results)
            assert isinstance(caught.value.exceptions[0].__cause__, VMCrashedError)
        else:
            assert await anext(results) == "done"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"template": {"vm_id": "x"}}, "id of its own"),
        ({"template": {"keep": True}}, "deletes its VMs"),
        ({"template": {"memroy": 1}}, "memroy"),
        ({"template": {"memory": 1}}, "memory=1"),
        ({"template": 5}, "pass a mapping"),
        ({"template": {"port_forwards": [(80, 8080)]}}, "8080"),
        ({"size": 0}, "size=0"),
        ({"size": True}, "size=True"),
        ({"max_live": -1}, "max_live=-1"),
        ({"max_booting": 1.5}, "max_booting=1.5"),
        ({"until": "launching"}, "until='launching'"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(
    blank: Template, arguments: dict[str, Any], words: str
) -> None:
    template: Any = (
        {**blank, **given} if isinstance(given := arguments.pop("template", {}), dict) else given
    )
    with pytest.raises(ConfigError, match=words):
        Fleet(template, **arguments)


@pytest.mark.usefixtures("debian")
async def test_a_linux_guest_does_jobs(data_dir: Path) -> None:
    async def job(vm: AsyncSmolVM, word: str) -> str:
        result = await vm.run(f"echo {word}; test {word} != bad", check=True)
        return str(result.stdout)

    template: VMOptions = {"accel": "tcg", "data_dir": data_dir, "memory": 256}
    async with Fleet(template, size=1, on_error="collect") as fleet:
        results = []
        with pytest.raises(ExceptionGroup) as caught:
            async for result in fleet.map(job, ["one", "two", "bad"], reuse=True):
                results.append(result)  # noqa: PERF401 (those before the failure count)
    assert results == ["one\n", "two\n"]
    assert isinstance(caught.value.exceptions[0].__cause__, CommandFailedError)
