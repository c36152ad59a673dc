"""Directories of snapshots: whole or not there, whatever fails; and nothing in them is trusted."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolvm_async import (
    AsyncSmolVM,
    ConfigError,
    SnapshotError,
    SnapshotExistsError,
    SnapshotNotFoundError,
)
from smolvm_async.config.checks import check_labels
from smolvm_async.config.options import complete, make_config, recheck
from smolvm_async.config.source import Source
from smolvm_async.foundation import entries
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.cache.layout import Layout
from smolvm_async.images.cache.tidying import uses
from smolvm_async.state.directory import VMDirectory
from smolvm_async.state.record import to_json
from smolvm_async.state.snapshot_directory import fork_name
from smolvm_async.state.snapshot_record import FileFacts, read_snapshot
from smolvm_async.state.snapshots import (
    SNAPSHOTS,
    delete_snapshot,
    held_snapshot,
    list_snapshots,
    new_snapshot,
)
from tests.conftest import fill_up
from tests.faults.injection import Run, run_once
from tests.unit.snapshots import (
    LAYERS,
    MEMORY,
    delete,
    fill,
    make,
    make_machine,
    make_record,
    make_vm,
    names,
    use,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A data directory with a VM that ran."""
    make_vm(tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def root(state: Path) -> Path:
    return state / SNAPSHOTS


def vm_directory(state: Path) -> VMDirectory:
    directory = VMDirectory(state, "clone")
    assert directory.try_hold(create=True)
    return directory


@pytest.mark.parametrize("live", [True, False])
async def test_a_snapshot_gives_its_files_to_a_vm(state: Path, root: Path, live: bool) -> None:
    before = os.umask(0)
    try:
        info = await make(state, live=live)
    finally:
        os.umask(before)
    assert [found._replace(age=info.age) for found in await list_snapshots(root)] == [info]
    kept = {"ram", "machine"} if live else {"tpm"}
    expected = {*LAYERS, "vars.fd", "snapshot.json", *kept}
    assert {path.name for path in (root / "base").iterdir()} == expected
    for path in (root, *root.rglob("*")):
        mode = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == mode

    directory = vm_directory(state)
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
    given = {path.name for path in directory.path.iterdir()} - {"host"}
    assert given == {*LAYERS, "vars.fd"} | ({"tpm"} if not live else set())
    directory.remove()
    await delete_snapshot(root, "base")
    assert not root.exists()


async def test_the_size_is_what_a_deletion_frees(state: Path, root: Path) -> None:
    (state / "vm-1" / LAYERS[0]).write_bytes(bytes(1 << 20))
    shared = (await make(state)).size
    assert shared < 1 << 20
    for name in LAYERS:
        (state / "vm-1" / name).unlink()
    (alone,) = await list_snapshots(root)
    assert alone.size >= shared + (1 << 20)


async def test_a_name_is_taken_once_and_a_missing_one_is_named(state: Path, root: Path) -> None:
    for call in (delete_snapshot(root, "base"), held_snapshot(root, "base").__aenter__()):
        with pytest.raises(SnapshotNotFoundError, match="name='base'"):
            await call
    async with new_snapshot(root, "base") as late:
        fill(late, state)
        await make(state)
        with pytest.raises(SnapshotExistsError, match="name='base' is taken"):
            await in_background(late.finish, make_record())
    with pytest.raises(SnapshotExistsError, match="name='base' is taken"):
        await make(state)
    (root / "photos").mkdir()
    with pytest.raises(SnapshotNotFoundError, match="name='photos'"):
        await delete_snapshot(root, "photos")
    assert sorted(os.listdir(root)) == ["base", "photos"]
    for name in ("../base", "", "Base", "base.new", 3):
        with pytest.raises(ConfigError, match="name="):
            await delete_snapshot(root, name)  # type: ignore[arg-type]


async def test_a_fork_uses_a_snapshot_without_a_name_and_leaves_nothing(
    state: Path, root: Path
) -> None:
    directory = vm_directory(state)
    async with new_snapshot(root, "fork") as new:
        fill(new, state)
        new.complete(make_record())
        new.give(directory)
        os.close(new.open("machine"))
        assert await list_snapshots(root) == []
    assert not root.exists()
    assert (directory.path / LAYERS[1]).samefile(state / "vm-1" / LAYERS[1])
    directory.remove()


async def test_a_deleted_snapshot_stays_until_its_last_user_has_finished(
    state: Path, root: Path
) -> None:
    await make(state)
    directory = vm_directory(state)
    async with held_snapshot(root, "base") as held:
        await delete_snapshot(root, "base")
        assert await list_snapshots(root) == []
        await make(state)
        await in_background(held.give, directory)
        assert (held.place / "vars.fd").read_text() == "content of vars.fd"
    assert (directory.path / "vars.fd").exists()
    assert os.listdir(root) == ["base"]
    directory.remove()


def program(function: str, state: Path) -> str:
    command = [sys.executable, "-m", "tests.unit.snapshots", function, str(state)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_a_process_that_dies_or_fails_at_any_step_leaves_a_whole_snapshot_or_none(
    state: Path,
) -> None:
    assert int(program("at_each_step", state)) > 100


async def test_processes_may_make_use_and_delete_a_snapshot_at_once(state: Path) -> None:
    assert "done" in program("at_once", state)


def cancel(run: Run) -> Generator[int, None, None]:
    run.cancel()
    yield from ()


def test_a_cancellation_at_any_await_leaves_a_whole_snapshot_or_none(state: Path) -> None:
    async def story() -> None:
        await make(state)
        await use(state)
        await delete(state)

    for point in itertools.count(1):
        run = run_once(story, cancel, point)
        assert not run.complaints
        assert run.ended_cancelled == run.cancelled
        left = names(state)
        if left:
            asyncio.run(use(state))
            asyncio.run(delete(state))
        assert not (state / SNAPSHOTS).exists()
        if not run.struck:
            break
    assert point > 10


async def test_prune_removes_what_a_dead_process_left(state: Path, root: Path) -> None:
    for name in (".base.new-01234567", ".base.old-89abcdef"):
        (root / name / "tpm").mkdir(parents=True)
        (root / name / "ram").touch()
    (root / "photos").mkdir()
    assert await AsyncSmolVM.prune(data_dir=state) == []
    assert os.listdir(root) == ["photos"]


async def test_the_snapshot_of_a_fork_is_not_shown_and_goes_with_its_process(
    state: Path, root: Path
) -> None:
    code = f"from {fork_name.__module__} import *; print(fork_name(Path()))"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    left, used = printed.stdout.strip(), fork_name(Path())
    elsewhere = re.sub("fork-.{8}", "fork-00000000", left)  # another host judges its processes
    for name in (used, elsewhere, left):
        await make(state, name)
    assert (root / left).exists()
    assert await list_snapshots(root) == []
    assert sorted(os.listdir(root)) == sorted([used, elsewhere])


async def test_a_snapshot_without_its_record_is_told_and_can_be_deleted(
    state: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await make(state)
    (root / "base" / "snapshot.json").unlink()
    await refused(root, "its record 'snapshot.json' is missing")
    assert await list_snapshots(root) == []
    assert "its record 'snapshot.json' is missing" in caplog.text
    await delete_snapshot(root, "base")
    assert not root.exists()


# Full disks, other file systems, few descriptors


async def test_a_full_disk_leaves_nothing(state: Path, root: Path, small_disk: Path) -> None:
    root.symlink_to(small_disk)
    (state / "vm-1" / LAYERS[0]).write_bytes(os.urandom(200_000))
    filler = fill_up(small_disk)
    reasons = []
    for free in range(0, 400_000, 16_384):
        os.truncate(filler, filler.stat().st_size - (16_384 if free else 0))
        try:
            await make(state)
        except SnapshotError as error:
            reasons.append(str(error))
            assert os.listdir(small_disk) == ["filler"]
        else:
            await use(state)
            await delete_snapshot(root, "base")
    assert len(reasons) > 5
    assert all("No space left on device" in reason for reason in reasons)
    assert os.listdir(small_disk) == ["filler"]


async def test_a_layer_is_copied_where_it_cannot_be_linked(
    state: Path, root: Path, small_disk: Path
) -> None:
    root.symlink_to(small_disk)
    layer = state / "vm-1" / LAYERS[0]
    with layer.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"x" * 70_000)
    os.utime(layer, ns=(1, 123_456_789_012_345_678))
    await make(state)
    directory = vm_directory(state)
    async with held_snapshot(root, "base") as held:
        held.give(directory)
    for copy in (root / "base" / LAYERS[0], directory.path / LAYERS[0]):
        assert copy.read_bytes() == layer.read_bytes()
        assert copy.stat().st_mtime_ns == layer.stat().st_mtime_ns
        assert copy.stat().st_blocks * 512 < 1 << 20
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    directory.remove()


def test_a_refused_link_becomes_a_copy_and_other_errors_do_not(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    fd = os.open(state / "vm-1", os.O_RDONLY | os.O_DIRECTORY)
    for number in (*entries.NO_LINK, errno.ENOSPC):
        source = entries.open_regular(LAYERS[0], fd)
        if number == errno.ENOSPC:
            with pytest.raises(OSError, match="No space left"):
                entries.link_or_copy(source, "copy", fd)
        else:
            entries.link_or_copy(source, "copy", fd)
            assert (state / "vm-1" / "copy").read_text() == f"content of {LAYERS[0]}"
            (state / "vm-1" / "copy").unlink()
        os.close(source)
    os.close(fd)


async def test_without_descriptors_nothing_is_left_and_the_error_says_so(
    state: Path, root: Path
) -> None:
    await make(state, "first")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    worked = set()
    for spare in range(8):
        fillers = []
        top = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 8, limits[1]))
        try:
            while True:
                fillers.append(os.dup(0))
        except OSError:
            for _ in range(spare):
                os.close(fillers.pop())
        try:
            await make(state)
            worked.add(spare)
        except SnapshotError as error:
            assert "Too many open files" in str(error)  # noqa: PT017
        finally:
            for fd in fillers:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        names = [info.name for info in await list_snapshots(root)]
        assert sorted(names) == sorted(os.listdir(root))
        assert names == (["first", "base"] if spare in worked else ["first"])
        if spare in worked:
            await delete_snapshot(root, "base")
    assert worked
    assert 0 not in worked


# Damaged and hostile snapshots


async def refused(root: Path, message: str) -> None:
    with pytest.raises(SnapshotError, match=message):
        async with held_snapshot(root, "base"):
            pass


@pytest.mark.parametrize("name", ["ram", "machine", "vars.fd", *LAYERS])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "is missing"),
        ("cut", "has 1 bytes instead of"),
        ("touched", "was changed"),
        ("link", "cannot be opened"),
        ("directory", "cannot be opened"),
        ("fifo", r"cannot be opened \(it is not a regular file"),
    ],
)
async def test_a_damaged_file_is_named(
    state: Path, root: Path, name: str, damage: str, message: str
) -> None:
    await make(state)
    path = root / "base" / name
    moved = path.rename(state / "moved")
    if damage == "link":
        path.symlink_to(moved)
    elif damage == "directory":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage != "missing":
        moved.rename(path)
        if damage == "cut":
            os.truncate(path, 1)
        else:
            os.utime(path, ns=(0, 0))
    await refused(root, f"'{name}' {message}.*cp -a")


@pytest.mark.parametrize("name", ["machine", "vars.fd"])
async def test_a_changed_file_of_the_same_size_and_time_is_found_by_its_hash(
    state: Path, root: Path, name: str
) -> None:
    await make(state)
    path = root / "base" / name
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    await refused(root, f"'{name}' has another content")


async def test_a_record_can_name_only_kernels_that_its_maker_had(
    state: Path, root: Path, tmp_path: Path
) -> None:
    kernel, secret = tmp_path / "kernel", tmp_path / "secret"
    kernel.write_text("kernel")
    secret.write_text("secret")
    record = make_record(machine=make_machine(source=Source(tmp_path / "disk", kernel)))
    async with new_snapshot(root, "base") as new:
        fill(new, state)
        new.finish(record)
    async with held_snapshot(root, "base") as held:
        assert held.record.boot_paths == [kernel]
    path = root / "base" / "snapshot.json"
    good = path.read_text()
    path.write_text(good.replace(str(kernel), str(secret)))
    await refused(root, f"'{secret}' is missing, or was changed")
    values = json.loads(good)
    values["machine"][3][2] = str(secret)  # the initramfs
    path.write_text(json.dumps(values))
    await refused(root, "does not describe the kernel")
    path.write_text(good)
    kernel.unlink()
    await refused(root, f"'{kernel}' is missing, or was changed")


async def test_a_snapshot_that_others_can_change_is_refused(state: Path, root: Path) -> None:
    await make(state)
    (root / "base").chmod(0o770)
    await refused(root, "another user can change it.*chmod")
    root.chmod(0o777)
    with pytest.raises(ConfigError, match="Other users of this machine can write to"):
        await make(state, "second")
    assert os.listdir(root) == ["base"]
    root.chmod(0o700)


@pytest.mark.parametrize("kind", ["file", "link"])
async def test_a_file_in_the_place_of_all_snapshots_is_named(
    state: Path, root: Path, kind: str
) -> None:
    if kind == "file":
        root.touch()
    else:
        root.symlink_to(state / "nowhere")
    with pytest.raises(SnapshotError, match="Not a directory"):
        await make(state)
    assert await AsyncSmolVM.prune(data_dir=state) == []


def outside(values: dict[str, Any], name: str) -> None:
    """Let a record name a file of the host."""
    values["files"][name] = values["files"]["vars.fd"]
    values["machine"][-1] = [*LAYERS, name]


def describe(values: dict[str, Any], image: str, disk_format: str = "qcow2") -> None:
    """Let a record name an image, and its format."""
    values["machine"][3] = [image, None, None, "", disk_format]


HOSTILE: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda values: values.update(schema_version=99), "another version of this library wrote it"),
    (lambda values: values.update(more=1), "another version of this library wrote it"),
    (lambda values: values["config"].update(more=1), "another version of this library wrote it"),
    (lambda values: values.pop("live"), "it is damaged"),
    (lambda values: outside(values, "/etc/passwd"), "it is damaged"),
    (lambda values: outside(values, "../../vm-1/vars.fd"), "it is damaged"),
    (lambda values: values["files"].update({"tpm/../x": [1, 1, ""]}), "do not belong"),
    (lambda values: values["files"].update({"tpm/tpm2-00.permall": [1, 1, ""]}), "do not belong"),
    (lambda values: values["machine"].__setitem__(0, "q35,accel=kvm"), "it is damaged"),
    (lambda values: values["machine"].__setitem__(-1, [LAYERS[0]] * 2), "do not belong"),
    (lambda values: values["machine"].__setitem__(-1, ["disk-7.qcow2"]), "'disk-7.qcow2' is miss"),
    (lambda values: values["files"].pop("ram"), "'ram' is missing"),
    (lambda values: values["config"].update(memory=MEMORY + 1), "does not have the size"),
    (lambda values: values["config"].update(memory=-1), "memory=-1 is less"),
    (lambda values: values["config"].update(os="plan9"), "os='plan9' is not a known guest OS"),
    (lambda values: values["config"].update(vm_id="../x"), "vm_id='../x' is wrong"),
    (lambda values: values["config"].update(cpus=10**6), "cpus=1000000 is wrong"),
    (lambda values: values.update(labels={"a": "\x1b[2J"}), "labels= has"),
    (lambda values: values.update(processor="max\n-device"), "it is damaged"),
    (lambda values: describe(values, "/a", "vmdk"), "does not describe an image's files"),
    (lambda values: describe(values, "/a\0b"), "does not describe an image's files"),
    (lambda values: describe(values, "/\ud800"), "does not describe an image's files"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
async def test_a_hostile_record_is_refused_and_its_snapshot_not_listed(
    state: Path,
    root: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    await make(state)
    path = root / "base" / "snapshot.json"
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values))
    await refused(root, message)
    assert await list_snapshots(root) == []
    assert message.partition("'")[0] in caplog.text
    await delete_snapshot(root, "base")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return each container in a JSON value with each of its keys."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@given(st.integers(min_value=0), JSON)
def test_any_value_in_a_record_is_accepted_or_makes_a_snapshot_error(
    tmp_path_factory: pytest.TempPathFactory, number: int, new: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.mkdir(exist_ok=True)
    facts = {name: FileFacts(MEMORY << 20, 1, "") for name in (*LAYERS, "ram", "machine")}
    values = {"record": json.loads(to_json(make_record(files=facts)))}
    found = places(values)
    container, key = found[number % len(found)]
    container[key] = new
    (path / "snapshot.json").write_text(json.dumps(values["record"]))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        read_snapshot(path, fd)
    except SnapshotError:
        pass
    finally:
        os.close(fd)


# What users of snapshots see elsewhere


async def test_an_image_that_a_snapshot_needs_is_in_use(
    state: Path, root: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "cache")
    layout.data_dirs.mkdir(parents=True)
    layout.note_data_dir(state)
    (tmp_path / "kernel").touch()
    source = Source(tmp_path / "disk", tmp_path / "kernel")
    record = make_record(machine=make_machine(source=source))
    async with new_snapshot(root, "base") as new:
        fill(new, state)
        new.finish(record)
    (use_of,) = uses(layout)
    assert (use_of.user, use_of.paths) == ("snapshot base", set(source.paths))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"os": "windows", "image": __file__, "vnc": "unix", "resolution": "640x480"},
        {"os": "linux", "image": "/a", "kernel": "/b", "initrd": "/c", "boot_args": "root=/dev/x"},
        {"os": "linux", "image": "/a", "kernel": "/b", "boot_args": "", "env": {"A": ""}},
        {"port_forwards": [80, (22, 2222)], "limits": {"vm_memory": 9000}, "keep": True},
    ],
)
def test_a_configuration_from_a_record_is_checked_and_stays_the_same(
    arguments: dict[str, Any],
) -> None:
    config = make_config(**arguments)
    assert recheck(config) == config
    for wrong in ({"cpus": 0}, {"env": {"A=": "1"}}, {"vm_id": "A"}, {"port_forwards": [(0, 1)]}):
        with pytest.raises(ConfigError):
            recheck(config.model_copy(update=wrong))


def test_the_configuration_of_a_published_image_is_checked_with_the_guest_of_its_manifest() -> None:
    config = complete(make_config(image="s3://bucket/x.json"), "windows", 4096, 2)
    assert recheck(config) == config
    for wrong in ({"os": "plan9"}, {"memory": 1}, {"user": "me"}):
        with pytest.raises(ConfigError):
            recheck(config.model_copy(update=wrong))


def test_labels_are_few_and_printable() -> None:
    assert check_labels(None) == {}
    assert check_labels({"a": "ü"}) == {"a": "ü"}
    for wrong in (
        "a",
        ["a"],
        {"": "a"},
        {"a": 1},
        {1: "a"},
        {"a": "\n"},
        {"a": "x" * 257},
        {"a": "\ud800"},
    ):
        with pytest.raises(ConfigError, match="labels="):
            check_labels(wrong)
    with pytest.raises(ConfigError, match="at most 64 labels"):
        check_labels({str(number): "" for number in range(65)})
