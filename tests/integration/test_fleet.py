"""Fleets of real VMs, most without an operating system; `map()` itself is a unit test."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import traceback
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
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
    SnapshotError,
    SnapshotNotFoundError,
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
from smolvm_async.images.build.debian import DebianImage
from smolvm_async.vm import clones
from tests.conftest import processes, run_of

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
    monkeypatch.setattr(Member, "_own_memory", lambda _: 0)
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
    monkeypatch.setattr("smolvm_async.foundation.files.SETTLED", 0)
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
        ({"warm": 0}, "warm=0 is wrong: pass True, False, or a whole number"),
        ({"warm": "yes"}, "warm='yes'"),
        ({"warm": 2, "max_live": 1}, "warm=2 VMs would wait forever: only max_live=1"),
        ({"from_snapshot": "A B"}, "from_snapshot='A B'"),
        ({"from_snapshot": "a"}, "cannot have image, memory, os together with from_snapshot="),
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


def test_clones_and_no_clones_exclude_each_other(data_dir: Path) -> None:
    template: Any
    for template, name in (({"data_dir": data_dir}, "a"), ({"accel": "tcg", "boot": "warm"}, None)):
        with pytest.raises(ConfigError, match="warm=False"):
            Fleet(template, warm=False, from_snapshot=name)


async def test_a_fleet_from_a_snapshot_keeps_clones_ready(blank: Template, data_dir: Path) -> None:
    template: VMOptions = {"accel": "tcg", "data_dir": data_dir}
    with pytest.raises(SnapshotNotFoundError, match="base"):
        await Fleet(template, from_snapshot="base").__aenter__()
    async with AsyncSmolVM(**blank) as vm:
        await vm.snapshot("base")
    try:
        fleet = Fleet(template, from_snapshot="base", warm=2, until="firmware", max_booting=1)
        async with fleet:
            while (status := fleet.status()).ready < 2:
                assert status.booting <= 1
                await asyncio.sleep(0.01)
            ahead = {member.vm_id for member in status.members}
            used = [vm_id async for _, vm_id in fleet.map(ident, range(4), in_order=True)]
            assert ahead == {*used[:2]}
            assert len(set(used)) == 4
            while (status := fleet.status()).ready < 2:
                await asyncio.sleep(0.01)
            assert len(status.members) == 2
            os.kill(qemu_of(next(iter(fleet._map_members)).vm), signal.SIGKILL)
            while not fleet.status().failed:
                await asyncio.sleep(0.01)
            assert len([item async for item, _ in fleet.map(ident, range(2))]) == 2
    finally:
        await AsyncSmolVM.delete_snapshot("base", data_dir=data_dir)


async def test_a_warm_fleet_that_is_cancelled_anywhere_leaves_nothing(
    blank: Template, data_dir: Path
) -> None:
    async def use() -> None:
        async with Fleet(blank, size=2, warm=1, until="firmware") as fleet:
            clones = await fleet.all_ready()
            assert fleet.status().members[0].vm_id == clones[0].vm_id  # the original is gone

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
        step += 97 + step
    await using
    assert step > 1000


@pytest.mark.parametrize("moment", ["boot", "snapshot"])
async def test_a_crash_of_the_vm_to_clone_fails_all_and_leaves_nothing(
    blank: Template, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(original: AsyncSmolVM) -> None:
        os.kill(qemu_of(original), signal.SIGKILL)
        await original.wait_stopped()

    async def wait_for(vm: AsyncSmolVM, *_: object) -> None:
        if moment == "boot":
            with suppress(VMCrashedError):
                await crash(vm)
            await waits(vm, "ready")

    @asynccontextmanager
    async def forked(vm: AsyncSmolVM) -> AsyncIterator[Any]:
        os.kill(qemu_of(vm), signal.SIGKILL)
        async with real(vm) as snapshot:
            yield snapshot

    waits, real = AsyncSmolVM.wait_for, clones.forked
    monkeypatch.setattr(AsyncSmolVM, "wait_for", wait_for)
    if moment == "snapshot":
        monkeypatch.setattr(clones, "forked", forked)
    with pytest.raises(ExceptionGroup) as caught:
        async with Fleet(blank, size=2, warm=True, until="firmware") as fleet:
            await fleet.all_ready()
            await asyncio.sleep(1000)
    assert len(caught.value.exceptions) == 2
    for failure in caught.value.exceptions:
        assert isinstance(failure.__cause__, VMCrashedError | SnapshotError | VMNotRunningError)


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


SEEN = "cat /run/original; cat /run/own; hostname; head -c 8 /dev/urandom | md5sum"
WRITTEN = 100  # MiB


@pytest.mark.timeout(200, func_only=True)
async def test_members_of_a_warm_fleet_are_clones_of_one_guest(
    debian: DebianImage, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def forked(vm: AsyncSmolVM) -> AsyncIterator[Any]:
        originals.append((vm, run_of(vm).own_memory()))
        await vm.run("echo original >/run/original", check=True)
        async with real(vm) as snapshot:
            yield snapshot

    async def job(vm: AsyncSmolVM, item: int) -> list[str]:
        seen = str((await vm.run(SEEN)).stdout)
        await vm.run(f"echo {item} >/run/own", check=True)
        return [vm.vm_id, *seen.split()]

    def unused() -> int:
        """Return how much of the promised memory the VMs do not use yet."""
        return sum(promise.unused() for promise in memory.PROMISES._promises)

    real, originals = clones.forked, list[tuple[AsyncSmolVM, int]]()
    monkeypatch.setattr(clones, "forked", forked)
    template: VMOptions = {
        "os": "linux",
        "image": debian.disk,
        "kernel": debian.kernel,
        "initrd": debian.initrd,
        "memory": 256,
        "accel": "tcg",
        "data_dir": data_dir,
    }
    async with Fleet(template, size=2, warm=True) as fleet:
        assert [member.waits_for for member in fleet.status().members[1:]] == ["a snapshot"] * 2
        vm, _ = await fleet.all_ready()
        assert "restored from a snapshot" in run_of(vm).boot.last.evidence
        ((original, whole),) = originals
        assert original.status == "deleted"
        before, promised = run_of(vm).own_memory(), unused()
        assert before < whole  # the other pages are the snapshot's
        await vm.run(f"head -c {WRITTEN}M /dev/zero >/dev/shm/x", check=True)
        assert run_of(vm).own_memory() >= before + WRITTEN * 9 // 10
        assert unused() <= promised - WRITTEN * 9 // 10
        await vm.delete()
        results = [seen async for seen in fleet.map(job, range(2))]
    assert len({vm_id for vm_id, *_ in results}) == 2
    for vm_id, state, hostname, *_ in results:  # without the files of other jobs
        assert (state, hostname) == ("original", vm_id)
    assert len({numbers for *_, numbers, _ in results}) == 2
