"""Whose VM is it: relations of hosts, statuses, claims; and the rights of directories."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, ConfigError, Status, VMExpiredError
from smolvm_async.config.options import make_config
from smolvm_async.doctor.checks import check_data_dir
from smolvm_async.doctor.findings import Outcome
from smolvm_async.foundation.files import make_private
from smolvm_async.foundation.process import Identity, identify, own_identity
from smolvm_async.host import identity
from smolvm_async.host.identity import HostIdentity, Relation, relation, this_host
from smolvm_async.state import claim as claims
from smolvm_async.state.claim import claim, unclaim
from smolvm_async.state.directory import VMDirectory, loose_parent
from smolvm_async.state.names import RECORD
from smolvm_async.state.record import Machine, Record, read_record
from smolvm_async.state.registry import prune_vms

HERE = HostIdentity("alpha", "m1", "b1", "pid:[1]")


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (HERE, Relation.SAME_PIDS),
        (HERE._replace(pid_namespace="pid:[2]"), Relation.SAME_KERNEL),
        (HERE._replace(pid_namespace=""), Relation.SAME_KERNEL),
        # A restarted container has another name, namespace and perhaps machine id.
        (HERE._replace(name="f00", machine="", pid_namespace="pid:[2]"), Relation.SAME_KERNEL),
        (HERE._replace(boot="b2"), Relation.EARLIER_BOOT),
        (HERE._replace(boot="b2", name="beta"), Relation.ANOTHER_HOST),  # a clone
        (HERE._replace(boot="b2", machine="m2"), Relation.ANOTHER_HOST),
        (HERE._replace(boot="b2", machine=""), Relation.ANOTHER_HOST),
        (HERE._replace(boot=""), Relation.SAME_KERNEL),
        (HERE._replace(boot="", name="beta"), Relation.ANOTHER_HOST),
        (None, Relation.SAME_KERNEL),  # a record of an earlier version
    ],
)
def test_a_host_is_known_by_boot_or_by_name_and_machine(
    there: HostIdentity | None, expected: Relation
) -> None:
    assert relation(there, HERE) is expected


def test_an_unknown_boot_is_not_the_same_boot() -> None:
    here = HERE._replace(boot="", pid_namespace="")
    assert relation(here, here) is Relation.SAME_KERNEL
    assert relation(HERE, here) is Relation.SAME_KERNEL
    assert relation(HERE._replace(name="beta"), here) is Relation.ANOTHER_HOST


def test_this_host_is_the_same_at_each_look_and_shows_no_machine_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert relation(this_host(), this_host()) is Relation.SAME_PIDS
    machine_id = tmp_path / "machine-id"
    monkeypatch.setattr(identity, "MACHINE_ID", machine_id)
    assert this_host().machine == ""
    machine_id.write_text("0123456789abcdef0123456789abcdef\n")
    assert this_host().machine
    assert "0123456789abcdef" not in json.dumps(this_host())


ALIVE, DEAD = own_identity(), Identity(4_000_000, 1)
OTHER_PIDS = this_host()._replace(pid_namespace="pid:[1]")
EARLIER = this_host()._replace(boot="b0")
BETA = this_host()._replace(boot="b0", name="beta")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("host", "owner", "locks", "held", "free"),
    [
        # The status while a process has the lock, and while the lock is free.
        (this_host(), ALIVE, True, "running", "orphaned"),
        (this_host(), DEAD, True, "orphaned", "orphaned"),
        (OTHER_PIDS, DEAD, True, "running", "orphaned"),
        (OTHER_PIDS, ALIVE, True, "running", "orphaned"),
        (EARLIER, ALIVE, True, "running", "orphaned"),
        (BETA, ALIVE, True, "elsewhere", "elsewhere"),
        (None, DEAD, True, "running", "orphaned"),
        (BETA, None, True, "running", "running"),
        # Locks have no effect: only a process id in this namespace proves anything.
        (this_host(), ALIVE, False, None, "running"),
        (this_host(), DEAD, False, None, "orphaned"),
        (OTHER_PIDS, DEAD, False, None, "elsewhere"),
        (EARLIER, DEAD, False, None, "elsewhere"),
        (BETA, DEAD, False, None, "elsewhere"),
    ],
)
def test_the_status_of_a_vm(
    directory: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: HostIdentity | None,
    owner: Identity | None,
    locks: bool,
    held: str | None,
    free: str,
) -> None:
    config = make_config(os="windows", image=__file__, data_dir=tmp_path)
    record = Record(config=config, created=1, status=Status.RUNNING, owner=owner, host=host)
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda fd, operation: None)
    fcntl.flock(directory, fcntl.LOCK_SH)  # as is_locked() leaves a free directory
    assert record.status_seen(directory, held=False) == free
    if held is not None:
        fcntl.flock(directory, fcntl.LOCK_UN)
        holder = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert record.status_seen(directory, held=True) == held
        os.close(holder)


@pytest.mark.parametrize("host", [OTHER_PIDS, EARLIER, BETA, None])
def test_process_ids_of_another_place_mean_no_process_here(
    tmp_path: Path, host: HostIdentity | None
) -> None:
    config = make_config(os="windows", image=__file__, data_dir=tmp_path)
    record = Record(config=config, created=1, owner=ALIVE, processes={"QEMU": ALIVE}, host=host)
    assert record.processes_here == []
    assert record.model_copy(update={"host": this_host()}).processes_here == [ALIVE]


def test_a_vm_of_a_living_owner_that_still_runs_is_used_though_its_lock_is_free(
    directory: int, tmp_path: Path
) -> None:
    config = make_config(os="windows", image=__file__, data_dir=tmp_path)
    parent = identify(os.getppid())
    record = Record(config=config, created=1, status=Status.RUNNING, owner=parent, host=this_host())
    fcntl.flock(directory, fcntl.LOCK_SH)
    for processes, status in (({"QEMU": ALIVE}, "running"), ({"QEMU": DEAD}, "orphaned")):
        record = record.model_copy(update={"processes": processes})
        assert record.status_seen(directory, held=False) == status
    record = record.model_copy(update={"owner": ALIVE, "processes": {"QEMU": parent}})
    assert record.status_seen(directory, held=False) == "orphaned"  # this process dropped the VM


# Claims


def as_host(monkeypatch: pytest.MonkeyPatch, host: HostIdentity) -> None:
    monkeypatch.setattr(claims, "this_host", lambda: host)


def test_one_host_claims_a_directory_until_it_removes_the_claim(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl.flock(directory, fcntl.LOCK_EX)
    as_host(monkeypatch, BETA)
    assert claim(directory, None) is None
    assert stat.S_IMODE((tmp_path / "host").stat().st_mode) == 0o600
    as_host(monkeypatch, this_host())
    assert claim(directory, None) == BETA
    assert claim(directory, "gamma") == BETA
    assert claim(directory, "beta") is None
    as_host(monkeypatch, BETA)
    assert claim(directory, None) == this_host()
    unclaim(directory)
    assert claim(directory, None) is None
    assert os.listdir(tmp_path) == ["host"]


LEFT = [
    *(json.dumps(left) for left in ([this_host(), DEAD], [OTHER_PIDS, ALIVE], [EARLIER, ALIVE])),
    *("garbage", "", "[[1, 2, 3, 4], []]", "link"),
]


@pytest.mark.parametrize("left", LEFT, ids=range(len(LEFT)))
def test_a_claim_that_means_nothing_any_more_is_replaced(
    directory: int, tmp_path: Path, left: str
) -> None:
    fcntl.flock(directory, fcntl.LOCK_EX)
    path = tmp_path / "host"
    if left == "link":
        path.symlink_to(tmp_path / "victim")
    else:
        path.write_text(left)
    assert claim(directory, None) is None
    assert json.loads(path.read_text()) == [[*this_host()], [*ALIVE]]
    assert os.listdir(tmp_path) == ["host"]


def test_the_claim_of_a_living_process_stays_even_if_its_lock_cannot_be_seen(
    directory: int, tmp_path: Path
) -> None:
    fcntl.flock(directory, fcntl.LOCK_EX)
    content = json.dumps([this_host(), identify(os.getppid())])
    (tmp_path / "host").write_text(content)
    assert claim(directory, None) == this_host()
    assert (tmp_path / "host").read_text() == content


def test_of_many_hosts_one_gets_the_claim(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        claims,
        "this_host",
        lambda: BETA._replace(name=os.urandom(4).hex(), boot=os.urandom(4).hex()),
    )
    for _ in range(20):
        barrier = Barrier(8)
        answers: list[HostIdentity | None] = []

        def work(barrier: Barrier = barrier, answers: list[HostIdentity | None] = answers) -> None:
            barrier.wait()
            answers.append(claim(directory, None))

        threads = [Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers.count(None) == 1
        assert os.listdir(tmp_path) == ["host"]
        unclaim(directory)


def test_a_directory_that_another_host_makes_is_not_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"
    with monkeypatch.context() as beta:
        as_host(beta, BETA)
        theirs = VMDirectory(data_dir, "a")
        assert theirs.try_hold(create=True)
    with monkeypatch.context() as blind:
        blind.setattr(fcntl, "flock", lambda fd, operation: None)
        ours = VMDirectory(data_dir, "a")
        assert not ours.try_hold(create=False)
        ours.abandon()
        assert ours.other_host == "beta"
    assert os.listdir(data_dir / "a") == ["host"]
    theirs.abandon()
    assert not os.listdir(data_dir)


# Rights


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_a_made_directory_and_its_parents_are_private(tmp_path: Path, umask: int) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o755)
    before = os.umask(umask)
    try:
        make_private(tmp_path / "there" / "a" / "b")
        make_private(tmp_path / "there" / "a" / "b")
    finally:
        os.umask(before)
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("there", "there/a", "there/a/b")
    ]
    assert modes == [0o755, 0o700, 0o700]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="File exists"):
        make_private(tmp_path / "file")


@pytest.mark.parametrize(
    ("mode", "loose"), [(0o755, False), (0o775, False), (0o1777, False), (0o777, True)]
)
def test_a_parent_that_others_can_change_is_found(tmp_path: Path, mode: int, loose: bool) -> None:
    parent = tmp_path / "parent"
    (parent / "between").mkdir(parents=True)
    parent.chmod(mode)
    assert loose_parent(parent / "between" / "data") == (parent if loose else None)


@pytest.mark.anyio
async def test_a_loose_parent_is_a_warning_in_the_log_and_of_the_doctor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data_dir = tmp_path / "parent" / "data"
    for _ in range(2):
        state = VMDirectory(data_dir, "a")
        assert state.try_hold(create=True)
        state.abandon()
        data_dir.parent.chmod(0o777)
    assert not caplog.messages
    verdict = await check_data_dir(data_dir)
    assert verdict.status is Outcome.WARNING
    assert f"chmod go-w {data_dir.parent}" in verdict.cure
    other = data_dir.parent / "other"
    for name in ("a", "b"):
        state = VMDirectory(other, name)
        assert state.try_hold(create=True)
        state.abandon()
    assert len([message for message in caplog.messages if "chmod go-w" in message]) == 1


@pytest.mark.anyio
async def test_an_empty_directory_is_pruned_only_if_the_library_can_have_made_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "photos").mkdir(mode=0o755)
    (tmp_path / "vm-1").mkdir(mode=0o700)
    assert await prune_vms(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert not list((tmp_path / "photos").iterdir())


@pytest.mark.parametrize("place", ["", "config"])
def test_a_record_with_an_unknown_field_is_of_another_version_and_not_damaged(
    directory: int, tmp_path: Path, place: str
) -> None:
    config = make_config(os="windows", image=__file__, data_dir=tmp_path.parent, vm_id="a")
    values = json.loads(Record(config=config, created=1).to_json())
    (values[place] if place else values)["network"] = {}
    (tmp_path / RECORD).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="another version of this library wrote it; use that one"):
        read_record(tmp_path, directory)


def record_of(data_dir: Path, vm_id: str, age: float, **options: Any) -> Record:
    """The record of a kept VM at rest that was created `age` seconds ago."""
    config = make_config(
        os="windows", image=__file__, data_dir=data_dir, vm_id=vm_id, keep=True, **options
    )
    created = time.time_ns() - round(age * 1e9)
    return Record(config=config, created=created, machine=Machine("pc-q35-7.2", 1, 1))


def test_the_time_of_a_vm_is_over_after_its_ttl(tmp_path: Path) -> None:
    assert record_of(tmp_path, "a", 60).seconds_left is None
    assert not record_of(tmp_path, "a", 60).expired
    assert not record_of(tmp_path, "a", 60, ttl=3600).expired
    left = record_of(tmp_path, "a", 60, ttl=3600).seconds_left
    assert left is not None
    assert 3500 < left <= 3540
    assert record_of(tmp_path, "a", 60, ttl=60).expired


@pytest.mark.anyio
async def test_vms_are_listed_by_labels_and_deleted_when_their_time_is_over(
    tmp_path: Path,
) -> None:
    tmp_path.chmod(0o700)
    labels = {"task": "42", "by": "me"}
    for record in (
        record_of(tmp_path, "old", 60, ttl=1, labels=labels),
        record_of(tmp_path, "new", 60, ttl=3600, labels=labels),
        record_of(tmp_path, "other", 30, labels={"task": "43"}),
    ):
        state = VMDirectory(tmp_path, record.config.vm_id)
        assert state.try_hold(create=True)
        state.write(record.at_rest(Status.STOPPED))
        state.release()
    with pytest.raises(VMExpiredError, match=r"1 s \(ttl=\)"):
        await AsyncSmolVM.from_id("old", data_dir=tmp_path)
    (found,) = await AsyncSmolVM.list(data_dir=tmp_path, labels={"task": "42"})
    assert (found.vm_id, found.labels, found.resident) == ("new", labels, None)
    assert not (tmp_path / "old").exists()
    assert [info.vm_id for info in await AsyncSmolVM.list(data_dir=tmp_path)] == ["new", "other"]
    assert await AsyncSmolVM.list(data_dir=tmp_path, labels={"task": "42", "by": "you"}) == []
    with pytest.raises(ConfigError, match="labels="):
        await AsyncSmolVM.list(data_dir=tmp_path, labels={"task": 42})  # type: ignore[dict-item]


def test_a_record_without_a_ttl_is_read_and_a_wrong_one_is_damaged(
    directory: int, tmp_path: Path
) -> None:
    values = json.loads(record_of(tmp_path.parent, "a", 0, ttl=5).to_json())
    for wrong in (float("inf"), float("nan"), -1, "5"):
        values["config"]["ttl"] = wrong
        (tmp_path / RECORD).write_text(json.dumps(values))
        with pytest.raises(ConfigError, match="it is damaged"):
            read_record(tmp_path, directory)
    values["schema_version"] = 4
    for name in ("labels", "ttl", "idle_timeout"):
        del values["config"][name]
    (tmp_path / RECORD).write_text(json.dumps(values))
    found = read_record(tmp_path, directory)
    assert found is not None
    assert (found.config.labels, found.config.ttl) == ({}, None)


def test_a_record_lists_the_layers_of_the_disk_and_accepts_only_their_names(
    directory: int, tmp_path: Path
) -> None:
    config = make_config(os="windows", image=__file__, data_dir=tmp_path.parent, vm_id="a")
    machine = Machine("pc-q35-7.2", 1, 1, layers=("overlay.qcow2", "disk-1.qcow2"))
    record = Record(config=config, created=1, machine=machine)
    values = json.loads(record.to_json())

    def read() -> Machine | None:
        (tmp_path / RECORD).write_text(json.dumps(values))
        found = read_record(tmp_path, directory)
        assert found is not None
        return found.machine

    assert read() == machine
    for name in ("../disk-1.qcow2", "disk-.qcow2", "disk-1.qcow2\n", "/disk-1.qcow2", "vars.fd"):
        values["machine"][-1] = ["overlay.qcow2", name]
        with pytest.raises(ConfigError, match="it is damaged"):
            read()
    values["machine"][-1] = []
    with pytest.raises(ConfigError, match="it is damaged"):
        read()
    values["schema_version"] = 2
    del values["machine"][-1]
    assert read() == machine._replace(layers=("overlay.qcow2",))
