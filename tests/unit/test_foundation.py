"""Locks between processes, files that are replaced as a whole, and the meter of progress."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from smolvm_async.foundation import locking
from smolvm_async.foundation.files import replace_file, seal
from smolvm_async.foundation.locking import LockFile, poll, turn_at
from smolvm_async.foundation.progress import Meter, Progress
from smolvm_async.foundation.tasks import in_thread


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.anyio
async def test_a_lock_file_has_one_holder_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    log = []

    async def work(number: int) -> None:
        async with LockFile(path).hold():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            log.append(number)
            await asyncio.sleep(0.03)
            log.append(number)

    await asyncio.gather(*(work(number) for number in range(4)))
    assert log[::2] == log[1::2]
    assert not path.exists()


@pytest.mark.anyio
async def test_one_has_its_turn_at_a_file_and_nobody_waits_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, inside, most = tmp_path / "file", 0, 0
    path.touch()
    monkeypatch.setattr(locking, "TURN_POLL", 0.001)

    async def work() -> None:
        nonlocal inside, most
        async with turn_at(path):
            inside += 1
            most = max(most, inside)
            await in_thread(int)  # the thread of all attempts
            inside -= 1

    await asyncio.gather(*(work() for _ in range(10)))
    assert most == 1
    monkeypatch.setattr(locking, "TURN", 0.0)
    async with turn_at(path), turn_at(path):
        pass
    async with turn_at(tmp_path / "missing"):
        pass


@pytest.mark.anyio
async def test_a_cancelled_wait_leaves_no_lock_wherever_it_is_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    await in_thread(int)  # the loop's thread is there

    async def hold() -> None:
        async with LockFile(path).hold():
            await asyncio.sleep(3600)

    before = open_descriptors()
    for held in (False, True):
        other = LockFile(path)
        assert not held or other.try_lock()
        for turns in range(12):
            task = asyncio.create_task(hold())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert path.exists() == held
        other.unlock()
        assert open_descriptors() == before


@pytest.mark.anyio
async def test_polling_ends_with_success_or_with_its_time() -> None:
    attempts: list[int] = []

    def third() -> bool:
        attempts.append(1)
        return len(attempts) == 3

    assert await poll(third, 10)
    assert len(attempts) == 3
    assert not await poll(lambda: False, 0.01)
    with pytest.raises(ZeroDivisionError):
        await poll(lambda: bool(1 // 0))


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    replace_file(file, b"old", mode=0o600)
    replace_file(file, b"new", temporary=tmp_path / "other")
    fd = os.open(tmp_path, os.O_RDONLY)
    replace_file("inside", b"it", temporary="inside.new", mode=0o600, dir_fd=fd)
    os.close(fd)
    assert stat.S_IMODE((tmp_path / "inside").stat().st_mode) == 0o600
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "directory", b"")
    seal(file, 0o400)
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"new", 0o400)
    assert sorted(os.listdir(tmp_path)) == ["directory", "file", "inside"]


def test_a_meter_tells_what_is_done_and_how_fast_and_a_bad_callback_harms_nothing() -> None:
    told: list[Progress] = []
    meter = Meter(told.append, "image", 10)
    meter.report("beginning")
    meter.report("copying", 5, copied=4)
    meter.report("another count", 1, 2, copied=-3)
    assert [(one.stage, one.message, one.done, one.total) for one in told] == [
        ("image", "beginning", None, 10),
        ("image", "copying", 5, 10),
        ("image", "another count", 1, 2),
    ]
    assert [one.rate is None for one in told] == [True, False, True]
    assert not meter.due
    Meter(lambda progress: print(1 / 0), "image").report("all the same")
