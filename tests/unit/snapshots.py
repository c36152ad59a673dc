"""Makes snapshots without QEMU; as a program, in children that die or fail at each of their steps.

`python -m tests.unit.snapshots FUNCTION STATE` calls a function below with the data directory.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from smolvm_async import (
    SmolVMError,
    SnapshotError,
    SnapshotExistsError,
    SnapshotInfo,
    SnapshotNotFoundError,
)
from smolvm_async.config.options import make_config
from smolvm_async.config.source import Source
from smolvm_async.foundation.tasks import in_background
from smolvm_async.state.directory import VMDirectory
from smolvm_async.state.record import Machine
from smolvm_async.state.snapshot_record import SnapshotRecord
from smolvm_async.state.snapshots import (
    SNAPSHOTS,
    NewSnapshot,
    delete_snapshot,
    held_snapshot,
    list_snapshots,
    new_snapshot,
)

LAYERS = ("overlay.qcow2", "disk-1.qcow2")
MEMORY = 256  # MiB

Work = Callable[[Path], Awaitable[object]]


def make_vm(state: Path) -> Path:
    """Make the directory of a VM that ran."""
    directory = state / "vm-1"
    (directory / "tpm").mkdir(parents=True, mode=0o700)
    for name in (*LAYERS, "vars.fd", "tpm/tpm2-00.permall", "tpm/.lock", "qemu.log"):
        (directory / name).write_text(f"content of {name}")
        (directory / name).chmod(0o600)
    return directory


def make_machine(source: Source | None = None) -> Machine:
    return Machine("pc-q35-7.2", 5, 6, source, layers=LAYERS)


def make_record(
    *, live: bool = True, machine: Machine | None = None, **values: Any
) -> SnapshotRecord:
    """Return the record that `snapshot()` passes to `finish()`."""
    return SnapshotRecord(
        config=make_config(os="linux", image=__file__, memory=MEMORY, vm_id="vm-1"),
        machine=machine or make_machine(),
        created=time.time_ns(),
        live=live,
        ready=False,
        accelerator="tcg",
        qemu="7.2.22",
        processor="max",
        **values,
    )


def fill(new: NewSnapshot, state: Path, *, live: bool = True) -> None:
    """Add the files of a VM, as `snapshot()` does."""
    try:
        vm = os.open(state / "vm-1", os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in LAYERS:
                new.link(vm, name)
            new.copy(vm, "vars.fd")
            if not live:
                new.copy(vm, "tpm")
        finally:
            os.close(vm)
        if live:
            with (new.path / "ram").open("wb") as ram:
                ram.truncate(MEMORY << 20)
                ram.write(b"memory")
            (new.path / "machine").write_bytes(b"devices")
            (new.path / "swtpm.log").write_text("of the twin")
    except OSError as error:
        raise SnapshotError(str(error)) from error


async def make(state: Path, name: str = "base", *, live: bool = True) -> SnapshotInfo:
    """Make a snapshot of the VM that `make_vm()` has made."""
    async with new_snapshot(state / SNAPSHOTS, name) as new:
        await in_background(lambda: fill(new, state, live=live))
        return await in_background(new.finish, make_record(live=live))


async def use(state: Path, vm_id: str = "clone") -> None:
    """Give the snapshot's files to a VM, and remove the VM."""
    directory = VMDirectory(state, vm_id)
    assert await in_background(directory.try_hold, True)
    try:
        async with held_snapshot(state / SNAPSHOTS, "base") as held:
            await in_background(held.give, directory)
            os.close(held.open("ram"))
        assert (directory.path / "vars.fd").read_text() == "content of vars.fd"
    finally:
        await in_background(directory.remove)


async def delete(state: Path) -> None:
    await delete_snapshot(state / SNAPSHOTS, "base")


def names(state: Path) -> list[str]:
    return [info.name for info in asyncio.run(list_snapshots(state / SNAPSHOTS))]


class Fault:
    """A fault at the n-th system call of this process that Python announces."""

    def __init__(self, point: int, strike: Callable[[], None]) -> None:
        self.left = point
        self._strike = strike
        self._lock = threading.Lock()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, _: object) -> None:
        if event == "open" or event.startswith(("os.", "fcntl.")):
            with self._lock:
                self.left -= 1
                strikes = self.left == 0
            if strikes:
                self._strike()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def child(work: Callable[[], Awaitable[object]], *allowed: type[Exception]) -> int:
    """Run work in a forked child; return its wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        asyncio.run(work())  # type: ignore[arg-type]
    except allowed:
        os._exit(3)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def at_each_step(state: Path) -> None:
    """Kill a child at each step of making, using and deleting a snapshot; or make the step fail."""
    steps = 0
    for work in (make, use, delete):
        for strike in (die, fail):
            steps += strike_each(state, work, strike)
    print(steps)


def strike_each(state: Path, work: Work, strike: Callable[[], None]) -> int:
    """Strike at each step of the work; return the number of steps."""
    # The VM's directory has errors of its own.
    allowed = (SnapshotError, *((SmolVMError, OSError) if work is use else ()))
    for point in itertools.count(1):
        if work is not make and not names(state):
            asyncio.run(make(state))

        async def faulty(point: int = point) -> None:
            fault = Fault(point, strike)
            await work(state)
            if fault.left <= 0 and strike is fail:
                os._exit(4)  # the error was of a step that may fail, such as a removal

        status = child(faulty, *allowed)
        shutil.rmtree(state / "clone", ignore_errors=True)
        assert status in ((0, 9) if strike is die else (0, 3 << 8, 4 << 8)), (work, point, status)
        after = names(state)
        assert after == ["base"] or (after == [] and work is not use)
        if after:
            asyncio.run(use(state))
            if work is make:
                asyncio.run(delete(state))
        root = state / SNAPSHOTS
        assert not root.exists() or os.listdir(root) == names(state), os.listdir(root)
        for layer in LAYERS:
            assert (state / "vm-1" / layer).read_text() == f"content of {layer}"
        if status == 0:
            return point - 1
    raise AssertionError("unreachable")


def at_once(state: Path) -> None:
    """Make, use, list and delete one snapshot in several processes at once."""
    errors = (SnapshotExistsError, SnapshotNotFoundError)

    async def work(number: int) -> None:
        choice = random.Random(number)
        counts = dict.fromkeys(("make", "use", "delete"), 0)
        for _ in range(100):
            step = choice.choice((make, use, delete))
            try:
                await (step(state, f"vm-{number}") if step is use else step(state))
                counts[step.__name__] += 1
            except errors:
                pass
            await list_snapshots(state / SNAPSHOTS)
        assert all(counts.values()), counts
        print(counts, flush=True)

    pids = [os.fork() or _end(child(partial(work, number))) for number in range(2, 6)]
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(statuses), statuses
    if names(state):
        asyncio.run(delete(state))
    assert not (state / SNAPSHOTS).exists()
    print("done")


def _end(status: int) -> int:
    os._exit(min(status, 1))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
