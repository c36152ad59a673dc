"""Fleets of real VMs; most need no operating system, and so have none."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
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
    JobFailedError,
    LaunchError,
    Limits,
    MemberFailedError,
    VMCrashedError,
    VMNotRunningError,
)
from smolvm_async.fleet import memory
from smolvm_async.fleet.jobs import READ_AHEAD
from smolvm_async.fleet.member import Member
from smolvm_async.foundation import process
from smolvm_async.host.accelerator import OVERHEAD
from smolvm_async.host.memory import Memory
from smolvm_async.images import qcow2

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(100, func_only=True)]

Template = Mapping[str, Any]


@pytest.fixture(autouse=True)
def nothing_promised(data_dir: Path) -> Any:
    """After each: no memory is promised, and no VM is left."""
    yield
    assert not memory.LEDGER._promises
    assert not data_dir.exists() or not [*data_dir.iterdir()]


def qemu_of(vm: AsyncSmolVM) -> int:
    """Its QEMU's process id."""
    run: Any = vm._vm.run
    return int(run._children[-1].identity.pid)


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


@pytest.mark.parametrize("reuse", [False, True])
async def test_map_runs_each_job_on_a_vm(blank: Template, reuse: bool) -> None:
    async with Fleet(blank, size=3, until="firmware") as fleet:
        results = [result async for result in fleet.map(ident, range(8), reuse=reuse)]
        assert sorted(item for item, _ in results) == list(range(8))
        assert len({vm_id for _, vm_id in results}) == (3 if reuse else 8)
        assert fleet.status().ready == 0


async def test_map_without_a_size_starts_what_it_needs_and_keeps_the_order(blank: Template) -> None:
    async def items() -> AsyncIterator[str]:
        for letter in "abcdef":
            yield letter

    async with Fleet(blank, until="firmware", max_live=3) as fleet:
        assert fleet.status().members == ()
        results = [letter async for letter, _ in fleet.map(ident, items(), in_order=True)]
        assert results == list("abcdef")
        assert [value async for value in fleet.map(ident, [])] == []


async def fails_at_two(vm: AsyncSmolVM, item: int) -> int:
    if item == 2:
        raise KeyError("two")
    return item


async def test_a_failed_job_cancels_the_rest(blank: Template) -> None:
    cancelled: list[int] = []

    async def job(vm: AsyncSmolVM, item: int) -> int:
        if item != 2:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                cancelled.append(item)
                raise
        return await fails_at_two(vm, item)

    async with Fleet(blank, until="firmware", max_live=4) as fleet:
        with pytest.raises(ExceptionGroup) as caught:
            async for _ in fleet.map(job, range(9)):
                raise AssertionError("there is no result")
        (failure,) = caught.value.exceptions
        assert isinstance(failure, JobFailedError)
        assert (failure.item, failure.index, failure.attempts) == (2, 2, 1)
        assert failure.vm_id in str(failure)
        assert isinstance(failure.__cause__, KeyError)
        assert set(cancelled) <= {0, 1, 3}
        assert fleet.status().ready == 0


async def test_failed_jobs_are_collected_and_the_others_go_on(blank: Template) -> None:
    results: list[int] = []
    async with Fleet(blank, until="firmware", max_live=3, on_error="collect") as fleet:
        with pytest.raises(ExceptionGroup) as caught:
            async for result in fleet.map(fails_at_two, [0, 1, 2, 3, 2, 4], in_order=True):
                results.append(result)  # noqa: PERF401 (those before the failure count)
    assert results == [0, 1, 3, 4]
    indexes = {
        error.index for error in caught.value.exceptions if isinstance(error, JobFailedError)
    }
    assert indexes == {2, 4}


async def test_a_job_is_tried_again_on_another_vm(blank: Template) -> None:
    tried: dict[int, list[str]] = {}

    async def job(vm: AsyncSmolVM, item: int) -> int:
        tried.setdefault(item, []).append(vm.vm_id)
        if item == 0 and len(tried[item]) == 1:
            os.kill(qemu_of(vm), signal.SIGKILL)
            await asyncio.sleep(1000)
        if item == 1 and len(tried[item]) < 3:
            raise ValueError("not yet")
        return item

    async with Fleet(blank, size=2, until="firmware") as fleet:
        results = [item async for item in fleet.map(job, range(3), retries=2, reuse=True)]
    assert sorted(results) == [0, 1, 2]
    assert [len(set(tried[item])) for item in range(3)] == [2, 3, 1]


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
        assert not memory.LEDGER._promises
        step += 29 + step // 3
    await using
    assert step > 100


async def test_memory_is_promised_once_between_two_fleets(
    blank: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's memory is pretended: two VMs fit into it."""
    room = 2 * (128 + OVERHEAD)
    monkeypatch.setattr(memory.LEDGER, "_look", lambda: Memory(0, room))
    monkeypatch.setattr(Member, "_resident", lambda _: 0)
    with pytest.raises(HostError, match="enough for 2"):
        await Fleet(blank, size=3, until="firmware").__aenter__()
    peaks: list[int] = []

    async def job(vm: AsyncSmolVM, item: int) -> None:
        peaks.append(sum(fleet.status().ready for fleet in fleets))
        assert sum(promise.size for promise in memory.LEDGER._promises) <= room

    async def drain(fleet: Fleet) -> None:
        async for _ in fleet.map(job, range(5)):
            pass

    fleets = [Fleet(blank, until="firmware", max_booting=8) for _ in range(2)]
    async with fleets[0], fleets[1]:
        await asyncio.gather(*map(drain, fleets))
    assert len(peaks) == 10
    assert max(peaks) <= 2


async def test_the_rest_of_a_map_ends_with_the_block(blank: Template) -> None:
    async with Fleet(blank, size=2, until="firmware") as fleet:
        async for _ in fleet.map(ident, range(100)):
            break
    assert fleet.status().ready == 0
    with pytest.raises(ConfigError, match="does not run"):
        fleet.map(ident, range(3))
    with pytest.raises(ConfigError, match="make a new one"):
        await fleet.__aenter__()


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

    async def run(command: Sequence[str | Path]) -> str:
        asked.append(Path(command[0]))
        return await process.run(command)

    def check(fd: int) -> qcow2.Header:
        looked.append(fd)
        return checked(fd)

    checked = qcow2.check
    monkeypatch.setattr("smolvm_async.images.source.run", run)
    monkeypatch.setattr("smolvm_async.images.qcow2.check", check)
    monkeypatch.setattr("smolvm_async.images.local.SETTLED", 0)
    async with Fleet({**blank, "image": image}, size=3, until="firmware") as fleet:
        for vm in await fleet.all_ready():
            run_of: Any = vm._vm.run
            (qemu,) = [child for child in run_of._children if child.name == "QEMU"]
            assert not any("pflash" in word for word in qemu.argv)
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
    limited = {**blank, "limits": Limits(max_memory=300)}
    with pytest.raises(HostError, match=r"enough for 2.*max_live=2"):
        await Fleet(limited, size=3, until="firmware").__aenter__()
    async with Fleet(limited, until="firmware") as fleet:
        results = [item async for item, _ in fleet.map(ident, range(6))]
    assert sorted(results) == [*range(6)]


async def test_map_is_refused_where_it_would_wait_for_ever(blank: Template) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> Any:
        return [result async for result in fleet.map(ident, [item])]

    async with Fleet(blank, size=2, max_live=2, until="firmware") as fleet:
        with pytest.raises(ExceptionGroup) as caught:
            await anext(fleet.map(job, [1]))
        assert "called by a job" in str(caught.value.exceptions[0])
    async with Fleet(blank, size=2, max_live=2, until="firmware") as fleet:
        vm, _ = await fleet.all_ready()
        with pytest.raises(ConfigError, match="no place for a VM"):
            fleet.map(ident, [1])
        await vm.delete()
        assert [item async for item, _ in fleet.map(ident, [1])] == [1]


async def test_a_job_that_does_not_heed_its_cancellation_loses_its_vm(
    blank: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolvm_async.fleet.jobs.GRACE", 0.1)
    stubborn: list[AsyncSmolVM] = []

    async def job(vm: AsyncSmolVM, item: int) -> None:
        stubborn.append(vm)
        while True:
            try:
                await vm.wait_stopped()
            except asyncio.CancelledError:
                continue
            return

    async with Fleet(blank, until="firmware") as fleet:
        results = fleet.map(job, [1])
        waiting = asyncio.ensure_future(anext(results))
        while not stubborn:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert str(stubborn[0].status) == "deleted"


class UnspeakableError(Exception):
    """Can neither be shown nor told."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


class Outcome(BaseException):
    """As those of test frameworks."""


async def test_whatever_a_job_raises_is_its_items_failure(blank: Template) -> None:
    async def job(vm: AsyncSmolVM, item: Any) -> Any:
        if isinstance(item, BaseException):
            raise item
        return item

    items = [0, UnspeakableError(), Outcome("failed"), GeneratorExit(), 4]
    async with Fleet(blank, size=2, until="firmware", on_error="collect") as fleet:
        results: list[Any] = []
        with pytest.raises(ExceptionGroup) as caught:
            async for result in fleet.map(job, items):
                results.append(result)  # noqa: PERF401 (those before the failure count)
    assert sorted(results) == [0, 4]
    failures = [error for error in caught.value.exceptions if isinstance(error, JobFailedError)]
    assert sorted(error.index for error in failures) == [1, 2, 3]
    assert "a UnspeakableError" in str(min(failures, key=lambda error: error.index))


@pytest.mark.parametrize("on_error", ["raise", "collect"])
async def test_items_that_raise_are_told_of(blank: Template, on_error: Any) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("no more")

    async with Fleet(blank, size=2, until="firmware", on_error=on_error) as fleet:
        results: list[int] = []
        with pytest.raises((OSError, ExceptionGroup)) as caught:
            async for result in fleet.map(fails_at_two, items(), reuse=True):
                results.append(result)  # noqa: PERF401 (those before the failure count)
    if on_error == "collect":
        assert isinstance(caught.value, ExceptionGroup)
        assert {type(error) for error in caught.value.exceptions} == {OSError, JobFailedError}
        assert sorted(results) == [0, 1]


async def yields(vm: AsyncSmolVM, item: int) -> AsyncIterator[int]:
    yield item


async def alone(vm: AsyncSmolVM) -> None:
    pass


def awaits_nothing(vm: AsyncSmolVM, item: int) -> int:
    return item


async def test_a_job_that_is_none_is_refused(blank: Template) -> None:
    jobs: Any = (yields, alone, 5)
    async with Fleet(blank, until="firmware") as fleet:
        for job in jobs:
            with pytest.raises(ConfigError, match="job="):
                fleet.map(job, [1])
        with pytest.raises(ExceptionGroup) as caught:
            await anext(fleet.map(awaits_nothing, [1]))  # type: ignore[arg-type]
    assert "make it an async function" in str(caught.value.exceptions[0])


async def test_a_vm_that_can_never_fit_holds_up_nobody(blank: Template) -> None:
    huge = {**blank, "memory": memory.LEDGER.capacity() + 1024}
    async with Fleet(blank, size=1, until="firmware") as fleet:
        await fleet.all_ready()
        with pytest.raises(HostError, match=r"1 VM of .* cannot live at once: .* smaller memory="):
            await Fleet(huge, until="firmware").__aenter__()
        results = [item async for item, _ in fleet.map(ident, range(2))]
        assert sorted(results) == [0, 1]


async def test_items_that_swallow_a_cancellation_end_with_the_map(blank: Template) -> None:
    async def items() -> AsyncIterator[int]:
        for item in range(100):
            with suppress(asyncio.CancelledError):  # as asyncio.wait_for() may
                await asyncio.sleep(0 if item < 2 else 0.2)
            yield item

    async with Fleet(blank, size=2, until="firmware") as fleet:
        results: Any = fleet.map(ident, items(), reuse=True)
        await anext(results)
        await results.aclose()
        assert not fleet.status().ready


async def test_who_waits_for_a_reader_gives_its_vm_back(
    blank: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolvm_async.fleet.jobs.IDLE", 0.1)
    async with Fleet(blank, size=2, max_live=2, until="firmware") as fleet:
        unread = fleet.map(ident, itertools.count(), reuse=True)
        await anext(unread)
        results = [item async for item, _ in fleet.map(ident, range(3))]
        assert sorted(results) == [0, 1, 2]
        chained = fleet.map(ident, fleet.map(ident, range(5), reuse=True), reuse=True)
        assert len([item async for item in chained]) == 5


async def test_a_map_that_can_have_no_vm_any_more_is_refused_when_it_begins(
    blank: Template,
) -> None:
    async with Fleet(blank, size=2, max_live=2, until="firmware") as fleet:
        results = fleet.map(ident, range(2))
        await fleet.all_ready()
        with pytest.raises(ConfigError, match="no place for a VM"):
            await anext(results)


async def test_what_map_has_hired_is_not_handed_over(blank: Template) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> str:
        hired.append(vm)
        await go_on.wait()
        return vm.vm_id

    hired: list[AsyncSmolVM] = []
    go_on = asyncio.Event()
    async with Fleet(blank, size=3, until="firmware") as fleet:
        doing = asyncio.ensure_future(anext(fleet.map(job, [1])))
        while not hired:
            await asyncio.sleep(0.01)
        others = await fleet.all_ready()
        assert len(others) == 2
        assert hired[0] not in others
        go_on.set()
        assert await doing == hired[0].vm_id


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


async def test_results_that_the_block_has_left_behind_are_gone(blank: Template) -> None:
    endless = asyncio.Event()
    stopped = asyncio.Event()

    async def job(vm: AsyncSmolVM, item: int) -> int:
        if item:
            endless.set()
            try:
                await asyncio.sleep(1000)
            finally:
                stopped.set()
        return item

    async with Fleet(blank, size=2, until="firmware") as fleet:
        begun, never_begun = fleet.map(job, range(9)), fleet.map(job, range(9))
        assert await anext(begun) == 0
        await endless.wait()
    assert stopped.is_set()
    for results in (begun, never_begun):
        with pytest.raises(ConfigError, match="iterate within it"):
            await anext(results)


@pytest.mark.parametrize("in_order", [False, True])
async def test_a_slow_reader_holds_the_jobs_back(blank: Template, in_order: bool) -> None:
    async def job(vm: AsyncSmolVM, item: int) -> int:
        return item

    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in itertools.count():
            taken.append(item)
            yield item

    async with Fleet(blank, size=2, until="firmware") as fleet:
        results = fleet.map(job, items(), reuse=True, in_order=in_order)
        assert await anext(results) in taken
        while len(taken) < READ_AHEAD * 2:
            await asyncio.sleep(0.01)
        for read in range(2, 20):
            assert await anext(results) in taken
            assert len(taken) <= read + READ_AHEAD * 2 + 2


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
    template = (
        {**blank, **given} if isinstance(given := arguments.pop("template", {}), dict) else given
    )
    with pytest.raises(ConfigError, match=words):
        Fleet(template, **arguments)


@pytest.mark.usefixtures("debian")
async def test_linux_guests_do_jobs(data_dir: Path) -> None:
    async def job(vm: AsyncSmolVM, word: str) -> str:
        result = await vm.run(f"echo {word}; test {word} != bad", check=True)
        return str(result.stdout)

    template = {"accel": "tcg", "data_dir": data_dir, "memory": 256}
    async with Fleet(template, size=2, on_error="collect") as fleet:
        results = []
        with pytest.raises(ExceptionGroup) as caught:
            async for result in fleet.map(job, ["one", "bad", "two"], reuse=True):
                results.append(result)  # noqa: PERF401 (those before the failure count)
    assert sorted(results) == ["one\n", "two\n"]
    assert isinstance(caught.value.exceptions[0].__cause__, CommandFailedError)
