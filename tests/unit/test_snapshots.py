"""Directories of snapshots: whole or not there, whatever fails; and nothing in them is trusted."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolvm_async import SnapshotError, SnapshotExistsError, SnapshotInfo, SnapshotNotFoundError
from smolvm_async.config.options import make_config
from smolvm_async.foundation.tasks import in_background
from smolvm_async.state.directory import VMDirectory
from smolvm_async.state.record import Machine
from smolvm_async.state.snapshot_record import SnapshotRecord
from smolvm_async.state.snapshots import (
    NewSnapshot,
    delete_snapshot,
    held_snapshot,
    list_snapshots,
    new_snapshot,
)

pytestmark = pytest.mark.anyio

LAYERS = ("overlay.qcow2", "disk-1.qcow2")
MEMORY = 256


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state" / ".snapshots"


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[int]:
    """The open directory of a VM that ran."""
    directory = tmp_path / "state" / "vm-1"
    (directory / "tpm").mkdir(parents=True, mode=0o700)
    for name in (*LAYERS, "vars.fd", "tpm/tpm2-00.permall", "tpm/.lock", "qemu.log"):
        (directory / name).write_text(f"content of {name}")
        (directory / name).chmod(0o600)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def record(*, live: bool = True, labels: dict[str, str] | None = None) -> SnapshotRecord:
    return SnapshotRecord(
        config=make_config(os="linux", image=__file__, memory=MEMORY, vm_id="vm-1"),
        machine=Machine("pc-q35-7.2", 5, 6, layers=LAYERS),
        created=time.time_ns(),
        live=live,
        ready=False,
        accelerator="tcg",
        qemu="7.2.22",
        processor="max",
        labels=labels or {},
    )


def fill(new: NewSnapshot, vm: int, *, live: bool = True) -> None:
    """Add the files of a VM, as `snapshot()` does."""
    for name in LAYERS:
        new.link(vm, name)
    new.copy(vm, "vars.fd")
    if live:
        with (new.path / "ram").open("wb") as ram:
            ram.truncate(MEMORY << 20)
            ram.write(b"memory")
        (new.path / "machine").write_bytes(b"devices")
        (new.path / "swtpm.log").write_text("of the twin")
    else:
        new.copy(vm, "tpm")


async def make(root: Path, vm: int, name: str = "base", *, live: bool = True) -> SnapshotInfo:
    async with new_snapshot(root, name) as new:
        fill(new, vm, live=live)
        return await in_background(new.finish, record(live=live))


def given(root: Path, vm_id: str = "clone") -> VMDirectory:
    directory = VMDirectory(root.parent, vm_id)
    assert directory.try_hold(create=True)
    return directory


@pytest.mark.parametrize("live", [True, False])
async def test_a_snapshot_gives_its_files_to_a_vm(root: Path, vm: int, live: bool) -> None:
    info = await make(root, vm, live=live)
    assert (await list_snapshots(root))[0]._replace(age=info.age) == info
    assert (
        stat.S_IMODE(root.stat().st_mode) == stat.S_IMODE((root / "base").stat().st_mode) == 0o700
    )
    kept = {"ram", "machine"} if live else {"tpm"}
    assert {path.name for path in (root / "base").iterdir()} == {
        *(*LAYERS, "vars.fd", "snapshot.json", *kept)
    }
    for path in (path for path in (root / "base").rglob("*") if path.is_file()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    directory = given(root)
    async with held_snapshot(root, "base") as held:
        assert held.record.machine.layers == LAYERS
        await in_background(held.give, directory)
        if live:
            ram = held.open("ram")
            assert os.read(ram, 6) == b"memory"
            os.close(ram)
    tpm = [] if live else ["tpm/tpm2-00.permall"]
    for name in (*LAYERS, "vars.fd", *tpm):
        assert (directory.path / name).read_text() == f"content of {name}"
        shared = (directory.path / name).samefile(root / "base" / name)
        assert shared == (name in LAYERS)
    assert not (directory.path / "ram").exists()
    directory.remove()
    await delete_snapshot(root, "base")
    assert not root.exists()
    assert os.stat(LAYERS[0], dir_fd=vm).st_nlink == 1


async def test_names_are_unique_and_missing_ones_are_named(root: Path, vm: int) -> None:
    for call in (delete_snapshot(root, "base"), held_snapshot(root, "base").__aenter__()):
        with pytest.raises(SnapshotNotFoundError, match="name='base'"):
            await call
    async with new_snapshot(root, "base") as late:
        fill(late, vm)
        await make(root, vm)
        with pytest.raises(SnapshotExistsError, match="name='base' is taken"):
            await in_background(late.finish, record())
    with pytest.raises(SnapshotExistsError, match="name='base' is taken"):
        await make(root, vm)
    assert os.listdir(root) == ["base"]


async def test_a_deleted_snapshot_stays_until_its_last_user_has_finished(
    root: Path, vm: int
) -> None:
    await make(root, vm)
    directory = given(root)
    async with held_snapshot(root, "base") as held:
        await delete_snapshot(root, "base")
        assert await list_snapshots(root) == []
        await make(root, vm)
        await in_background(held.give, directory)
    assert (directory.path / "vars.fd").exists()
    assert os.listdir(root) == ["base"]
    directory.remove()


@pytest.mark.parametrize("name", ["ram", "machine", "vars.fd", *LAYERS])
@pytest.mark.parametrize(
    ("damage", "message"),
    [("missing", "is missing"), ("cut", "has 1 bytes instead of"), ("touched", "was changed")],
)
async def test_a_damaged_file_is_named(
    root: Path, vm: int, name: str, damage: str, message: str
) -> None:
    await make(root, vm)
    path = root / "base" / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, 1)
    else:
        os.utime(path, ns=(0, 0))
    with pytest.raises(SnapshotError, match=f"'{name}' {message}.*cp -a"):
        async with held_snapshot(root, "base"):
            pass
