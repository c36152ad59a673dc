"""A fault at the awaits of snapshot, restore and fork: a whole snapshot or none, an unharmed VM.

A VM that boots shares its memory with this process, and saves itself. A clone is saved by a second
QEMU, its twin. So the stories take snapshots of both.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import signal
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import (
    AsyncSmolVM,
    SnapshotError,
    SnapshotExistsError,
    SnapshotNotFoundError,
)
from smolvm_async.images.local import open_image
from smolvm_async.qemu import saving
from smolvm_async.qemu.disk import MOST
from smolvm_async.vm import snapshot
from tests.conftest import BOOT, descriptors, fill_up, processes, run_of
from tests.faults.injection import Run, at_the_awaits, run_once
from tests.faults.stage import Stage
from tests.faults.test_every_await import EVERY, FAULTS
from tests.faults.test_killed_owners import wait_until_gone

Story = Callable[[dict[str, Any]], Coroutine[Any, Any, None]]


async def goes_on(vm: AsyncSmolVM) -> None:
    """Check that QEMU still runs the guest, unless QEMU was killed."""
    assert await run_of(vm).guest_status() in ("running", "")


async def saved(blank: dict[str, Any]) -> None:
    async with AsyncSmolVM(**blank) as vm:
        try:
            await vm.snapshot("one")
        finally:
            await goes_on(vm)


async def saved_clone(blank: dict[str, Any]) -> None:
    async with AsyncSmolVM(**blank) as vm:
        clones = await vm.fork(1)
        try:
            await clones[0].snapshot("one")
        finally:
            try:
                await goes_on(clones[0])
            finally:
                await clones[0].delete()


async def restored(blank: dict[str, Any]) -> None:
    async with AsyncSmolVM(**blank) as vm:
        await vm.snapshot("one")
    async with AsyncSmolVM.from_snapshot("one", data_dir=blank["data_dir"]) as clone:
        await clone.stop(timeout=0)
        await clone.start()
    await AsyncSmolVM.delete_snapshot("one", data_dir=blank["data_dir"])


async def forked(blank: dict[str, Any]) -> None:
    async with AsyncSmolVM(**blank) as vm, vm.fork(2):
        pass


async def kept(blank: dict[str, Any]) -> None:
    """Every snapshot but the first flattens the disk; the second is taken at rest."""
    vm = AsyncSmolVM(**blank, vm_id="kept", keep=True)
    try:
        async with vm:
            await vm.snapshot("one")
        await vm.snapshot("two")
        await vm.start()
        await vm.snapshot("three")
        await vm.stop(timeout=0)
        await vm.start()
    finally:
        await vm.delete()


async def attached(blank: dict[str, Any]) -> None:
    async with AsyncSmolVM(**blank) as vm:
        found = await AsyncSmolVM.from_id(vm.vm_id, data_dir=blank["data_dir"])
        async with found, found.fork(1):
            pass


async def with_tpm(blank: dict[str, Any]) -> None:
    await restored({**blank, "os": "windows", "memory": 2048})


# Some of the primes are large: a clone is saved in some 900 awaits, most of them alike.
PLAN: list[tuple[str, list[Story], int]] = [
    ("cancel", [saved], 9),
    ("cancel", [kept], 29),
    ("cancel", [restored, forked, attached], 37),
    ("cancel", [saved_clone], 59),
    ("cancel, and 1 await later", [saved, kept], 37),
    ("SIGKILL QEMU", [saved], 19),
    ("SIGKILL QEMU", [restored, kept], 79),
    ("SIGKILL QEMU", [saved_clone], 157),
    ("SIGKILL swtpm", [with_tpm], 19),
    ("EMFILE for 5 awaits", [forked], 79),
    ("EMFILE for 5 awaits", [saved_clone], 157),
    ("EMFILE to the end", [saved], 19),
]


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(snapshot, "MOST", 2)
    monkeypatch.setattr(saving, "LOOK", 0.1)  # or most awaits are those between two looks
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize(
    ("fault", "story", "stride"),
    [
        pytest.param(fault, story, 1 if EVERY else stride, id=f"{fault}-{story.__name__}")
        for fault, stories, stride in PLAN
        for story in stories
    ],
)
def test_at_the_awaits(
    blank: dict[str, Any],
    fault: str,
    story: Story,
    stride: int,
    record_property: Callable[[str, object], None],
) -> None:
    check(run_once(lambda: story(blank)), blank, "no fault")  # everything is imported
    struck = 0
    for run in at_the_awaits(lambda: story(blank), FAULTS[fault], stride):
        check(run, blank, f"{fault} at await {run.point}")
        struck += run.struck
    assert struck
    record_property("injected", (fault, struck))


def check(run: Run, blank: dict[str, Any], fault: str) -> None:
    problems = run.problems()
    try:
        asyncio.run(look_for_leftovers(blank["data_dir"]))
    except Exception as error:
        problems.append(f"something is left, or a snapshot is not whole: {error!r}")
    assert not problems, f"{fault} ({run.site}), {run.error!r}: {problems}"


async def look_for_leftovers(data_dir: Path) -> None:
    """Restore and delete every snapshot, and start and delete every kept VM."""
    await AsyncSmolVM.prune(data_dir=data_dir)
    for info in await AsyncSmolVM.list(data_dir=data_dir):
        assert info.keep, info
        vm = await AsyncSmolVM.from_id(info.vm_id, data_dir=data_dir)
        await vm.start()
        await vm.delete()
    for found in await AsyncSmolVM.snapshots(data_dir=data_dir):
        async with AsyncSmolVM.from_snapshot(found.name, data_dir=data_dir):
            pass
        await AsyncSmolVM.delete_snapshot(found.name, data_dir=data_dir)
    assert not list(data_dir.glob("*"))


@pytest.mark.parametrize("of_clone", [False, True])
@pytest.mark.anyio
async def test_a_twin_or_a_disk_that_fails_leaves_the_vm_unharmed(
    blank: dict[str, Any], of_clone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncSmolVM(**blank) as original, original.fork(1) as clones:
        vm = clones[0] if of_clone else original

        def no_space(*_: object) -> None:
            raise OSError(28, os.strerror(28))

        with monkeypatch.context() as patch:  # while the guest stands still
            patch.setattr(snapshot, "_copy_variables", no_space)
            with pytest.raises(SnapshotError, match="No space left on device"):
                await vm.snapshot("one")
        await goes_on(vm)
        if of_clone:
            monkeypatch.setattr(snapshot, "open_boot_files", kill_twin(blank["data_dir"]))
            with pytest.raises(SnapshotError, match="killed by SIGKILL"):
                await vm.snapshot("one")
            monkeypatch.undo()
        await goes_on(vm)
        await vm.snapshot("one")
        await goes_on(vm)
        for layer in (blank["data_dir"] / vm.vm_id).glob("*.qcow2"):
            subprocess.run(["qemu-img", "check", "-q", "-U", str(layer)], check=True)
    await look_for_leftovers(blank["data_dir"])


def kill_twin(data_dir: Path) -> Callable[..., Any]:
    """Return a replacement of `open_boot_files` that also kills the twin as soon as it runs."""

    async def kill() -> None:
        while not (found := processes(data_dir / ".snapshots")):
            await asyncio.sleep(0.001)
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    tasks = []

    async def opened(*_: object) -> None:
        tasks.append(asyncio.create_task(kill()))

    return opened


@pytest.mark.anyio
async def test_a_full_disk_is_named(blank_image: Path, small_disk: Path) -> None:
    data_dir = small_disk / "data"
    options = {"os": "linux", "image": blank_image, "memory": 128, "accel": "tcg"}
    vm = AsyncSmolVM(**options, data_dir=data_dir, keep=True)  # type: ignore[arg-type]
    async with vm:
        for free in range(0, 20 * 4096, 4096):
            filler = fill_up(small_disk)
            os.truncate(filler, filler.stat().st_size - free)
            with pytest.raises(
                SnapshotError, match=r"No space left on device(.|\n)*ree some space"
            ):
                await vm.snapshot("one")
            await goes_on(vm)
            filler.unlink()
        assert not await AsyncSmolVM.snapshots(data_dir=data_dir)
        await vm.stop(timeout=0)
        await vm.start()
    await vm.delete()
    assert not list(data_dir.iterdir())


@pytest.mark.anyio
async def test_two_tasks_with_one_name_get_whole_snapshots_and_clear_errors(
    blank: dict[str, Any],
) -> None:
    data_dir = blank["data_dir"]
    restored = 0

    async def take(vm: AsyncSmolVM) -> None:
        nonlocal restored
        for _ in range(8):
            try:
                await vm.snapshot("one")
                async with AsyncSmolVM.from_snapshot("one", data_dir=data_dir):
                    restored += 1
                await AsyncSmolVM.delete_snapshot("one", data_dir=data_dir)
            except (SnapshotExistsError, SnapshotNotFoundError):
                continue

    async with AsyncSmolVM(**blank) as one, AsyncSmolVM(**blank) as other:
        await asyncio.gather(take(one), take(other))
        await asyncio.gather(goes_on(one), goes_on(other))
    assert restored
    await look_for_leftovers(data_dir)


@pytest.mark.usefixtures("frozen")
@pytest.mark.anyio
async def test_a_cancelled_flattening_does_not_keep_the_disk_busy(
    blank: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncSmolVM(**blank) as vm:
        await vm.snapshot("one")
        monitor = run_of(vm)._monitor
        execute = monitor.execute

        async def cancelled(command: str, *arguments: Any) -> Any:
            if command == "block-stream":
                save.cancel()
            return await execute(command, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(monitor, "execute", cancelled)
            save = asyncio.create_task(vm.snapshot("two"))
            with pytest.raises(asyncio.CancelledError):
                await save
        await vm.snapshot("two")
        for name in ("one", "two"):
            await AsyncSmolVM.delete_snapshot(name, data_dir=blank["data_dir"])


@pytest.mark.anyio
async def test_many_snapshots_and_forks_leave_nothing(blank: dict[str, Any]) -> None:
    data_dir = blank["data_dir"]

    async def once() -> None:
        await vm.snapshot("one")
        async with vm.fork(1):
            pass
        await AsyncSmolVM.delete_snapshot("one", data_dir=data_dir)

    async with AsyncSmolVM(**blank) as vm:
        await once()
        ours, qemus = descriptors(), processes(data_dir)
        for _ in range(20):
            await once()
        async with asyncio.timeout(BOOT):  # a connection of the last clone may just be closing
            while descriptors() != ours:
                await asyncio.sleep(0.01)
        assert processes(data_dir) == qemus
        directory = data_dir / vm.vm_id
        assert len(list(directory.glob("*.qcow2"))) <= MOST + 1
        for layer in directory.glob("*.qcow2"):
            with open_image(layer):
                pass
    assert not list(data_dir.iterdir())


def test_an_owner_that_is_killed_leaves_a_whole_snapshot_or_none(
    blank: dict[str, Any], stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    stride = 1 if EVERY else 79
    killed = 0
    for point in itertools.count(random.SystemRandom().randint(1, stride), stride):
        stage.call("killed_saving_at", point, blank["image"], blank["data_dir"])
        pid, _ = stage.hear("starts")
        wait_until_gone(pid, blank["data_dir"])
        asyncio.run(look_for_leftovers(blank["data_dir"]))
        if stage.has_said("ends", pid):
            break
        killed += 1
    assert killed > 3
    record_property("injected", ("SIGKILL the owner", killed))
