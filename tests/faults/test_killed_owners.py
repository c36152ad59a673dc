"""SIGKILL of every process in every order: none outlives its owner, and its directory is found.

`prune()` or the next start of its id clears the directory. Processes, the directory and `list()`
are compared after each kill; the next VM is started after every fourth and after the last.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from smolvm_async import AsyncSmolVM, Status, VMInfo
from smolvm_async.foundation.process import identify
from tests.faults.actors import make
from tests.faults.injection import PROGRAMS
from tests.faults.stage import LONG, Stage, inhabitants, kill

GONE = 2.0  # seconds from an owner's death until nothing of it runs
STARTS = 4  # kills for each start of the next VM
RANDOM_MOMENTS, RACES = 15, 5
PARTIES = ("owner", "client", *PROGRAMS)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def wait_until_gone(pid: int, data_dir: Path) -> None:
    wait_for(lambda: not exists(pid), LONG, f"process {pid} lives")
    wait_for(lambda: not inhabitants(data_dir), GONE, "something outlived its owner")


def listed(data_dir: Path) -> list[VMInfo]:
    return list(asyncio.run(AsyncSmolVM.list(data_dir=data_dir)))


def pruned(data_dir: Path) -> list[VMInfo]:
    return list(asyncio.run(AsyncSmolVM.prune(data_dir=data_dir)))


def check_left(image: Path, data_dir: Path, *, keep: bool, start: bool = True) -> int:
    """List and prune the VM that a dead owner left. With `start`, a VM with its id starts then.

    Returns:
        The number of orphans: the owner may have died before its VM began, or after its end.
    """
    orphans = [info.vm_id for info in listed(data_dir) if info.status is Status.ORPHANED]
    assert [info.vm_id for info in pruned(data_dir)] == orphans
    assert not pruned(data_dir)
    left = listed(data_dir)
    assert {info.status for info in left} <= {Status.STOPPED, Status.CRASHED}
    assert keep or not left
    asyncio.run(delete(image, data_dir, found=bool(left), start=start))
    assert not inhabitants(data_dir)
    assert not list(data_dir.glob("*"))
    return len(orphans)


async def delete(image: Path, data_dir: Path, *, found: bool, start: bool = True) -> None:
    """Delete the VM that was found, or else a new one. With `start`, it starts first."""
    if found:
        vm = await AsyncSmolVM.from_id("vm", data_dir=data_dir)
    else:
        assert not list(data_dir.glob("*"))
        vm = make(str(image), str(data_dir), False)
    if start:
        await vm.start()
    await vm.delete()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("first", PARTIES)
def test_in_every_order(
    stage: Stage,
    blank_image: Path,
    data_dir: Path,
    first: str,
    keep: bool,
    record_property: Callable[[str, object], None],
) -> None:
    others = [party for party in PARTIES if party != first]
    orders = [order for n in range(4) for order in itertools.permutations(others, n)]
    for number, order in enumerate(orders, 1):
        victims = (first, *order)
        stage.call("owner", blank_image, data_dir, keep)
        owner, _ = stage.hear("runs")
        stage.call("client", data_dir)
        client, _ = stage.hear("attached")
        pids = {"owner": owner, "client": client, **inhabitants(data_dir)}
        assert {*pids} == {*PARTIES}
        for victim in victims:
            kill(pids[victim])
        if victims == ("client",):
            assert [info.status for info in listed(data_dir)] == [Status.RUNNING]
            os.kill(owner, signal.SIGUSR1)
            stage.hear("ends", pid=owner)
        elif "owner" not in victims:
            stage.hear("VMCrashedError", pid=owner)
        wait_until_gone(owner, data_dir)
        if "client" not in victims:
            stage.hear("VMCrashedError", pid=client)
        start = number % STARTS == 0  # 16 orders: the last one, too
        orphans = check_left(blank_image, data_dir, keep=keep, start=start)
        assert orphans == 1 if first == "owner" else orphans <= ("owner" in victims)
    record_property("injected", ("SIGKILL in every order", len(orders)))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("parity", [0, 1])
def test_an_owner_at_every_await(
    stage: Stage,
    blank_image: Path,
    data_dir: Path,
    keep: bool,
    parity: int,
    record_property: Callable[[str, object], None],
) -> None:
    orphans = killed = 0
    for point in itertools.count(1 + parity, 2):
        stage.call("killed_at", point, blank_image, data_dir, keep)
        owner, _ = stage.hear("starts")
        wait_until_gone(owner, data_dir)
        assert not stage.has_said("fails", owner)
        ended = stage.has_said("ends", owner)
        start = ended or killed % STARTS == 0
        orphans += check_left(blank_image, data_dir, keep=keep, start=start)
        if ended:
            break
        killed += 1
    assert orphans > killed / 2
    record_property("injected", ("SIGKILL owner, at an await", killed))


@pytest.mark.parametrize("keep", [False, True])
def test_an_owner_at_random_moments(
    stage: Stage,
    blank_image: Path,
    data_dir: Path,
    keep: bool,
    record_property: Callable[[str, object], None],
) -> None:
    stage.call("short_life", blank_image, data_dir, keep)
    owner, _ = stage.hear("starts")
    began = time.monotonic()
    stage.hear("ends", pid=owner)
    duration = time.monotonic() - began
    wait_until_gone(owner, data_dir)
    check_left(blank_image, data_dir, keep=keep)
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"{seed=}, {duration=:.3f} s")
    chance = random.Random(seed)
    for moment in range(RANDOM_MOMENTS):
        stage.call("short_life", blank_image, data_dir, keep)
        owner, _ = stage.hear("starts")
        time.sleep(chance.random() * duration)  # the moment
        kill(owner)
        wait_until_gone(owner, data_dir)
        start = (RANDOM_MOMENTS - moment) % STARTS == 1
        check_left(blank_image, data_dir, keep=keep, start=start)
    record_property("injected", ("SIGKILL owner, at random", RANDOM_MOMENTS))


def leave_survivors(stage: Stage, image: Path, data_dir: Path, *, keep: bool) -> dict[str, int]:
    """An owner that dies, and children that do not."""
    stage.call("careless_owner", image, data_dir, keep)
    owner, _ = stage.hear("runs")

    def recorded() -> bool:
        return [info.status for info in listed(data_dir)] == [Status.RUNNING]

    wait_for(recorded, LONG, "its processes are not recorded")
    kill(owner)
    wait_for(lambda: not exists(owner), LONG, "the owner lives")
    survivors = inhabitants(data_dir)
    assert {*survivors} == {*PROGRAMS}
    assert [info.status for info in listed(data_dir)] == [Status.ORPHANED]
    return survivors


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("by", ["prune", "start"])
def test_what_survives_its_owner_is_ended(
    stage: Stage, blank_image: Path, data_dir: Path, keep: bool, by: str
) -> None:
    survivors = leave_survivors(stage, blank_image, data_dir, keep=keep)
    if by == "prune":
        assert [info.status for info in pruned(data_dir)] == [Status.ORPHANED]
    else:
        asyncio.run(delete(blank_image, data_dir, found=True))
    assert not inhabitants(data_dir)
    assert not any(identify(pid) for pid in survivors.values())
    check_left(blank_image, data_dir, keep=keep)


@pytest.mark.parametrize("keep", [False, True])
def test_everybody_at_once_on_what_a_dead_owner_left(
    stage: Stage, blank_image: Path, data_dir: Path, keep: bool
) -> None:
    for _ in range(RACES):
        leave_survivors(stage, blank_image, data_dir, keep=keep)
        stage.call("pruner", data_dir)
        stage.call("pruner", data_dir)
        stage.call("starter", blank_image, data_dir)
        stage.call("visitor", data_dir)
        for _ in range(4):
            pid, word = stage.hear("prunes", "starts", "looks")
            refusals = ["VMAlreadyExistsError", "VMNotFoundError", "VMNotRunningError"]
            stage.hear("ends", *(refusals if word != "prunes" else ()), pid=pid)
        check_left(blank_image, data_dir, keep=keep)


def test_bystanders_are_not_killed(
    stage: Stage, blank_image: Path, data_dir: Path, tmp_path: Path
) -> None:
    survivors = leave_survivors(stage, blank_image, data_dir, keep=False)
    directory = data_dir / "vm"
    namesake = tmp_path / PROGRAMS[0]
    shutil.copy("/bin/sleep", namesake)
    unrecorded, another_since, elsewhere = bystanders = [
        subprocess.Popen([namesake, "600"], cwd=cwd) for cwd in (directory, directory, tmp_path)
    ]
    record = json.loads((directory / "vm.json").read_text())
    for name, bystander in (("another", another_since), ("elsewhere", elsewhere)):
        identity = identify(bystander.pid)
        assert identity is not None
        started = identity.started - (bystander is another_since)
        record["processes"][name] = (identity.pid, started)
    (directory / "vm.json").write_text(json.dumps(record))
    try:
        assert len(pruned(data_dir)) == 1
        assert not any(identify(pid) for pid in survivors.values())
        assert not list(data_dir.iterdir())
        assert [bystander.poll() for bystander in bystanders] == [None] * 3
        assert unrecorded.poll() is None
    finally:
        for bystander in bystanders:
            bystander.kill()
            bystander.wait()
