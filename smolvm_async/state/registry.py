"""All VMs of a data directory: list the VMs, and remove the VMs of dead owners."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from smolvm_async.config.checks import VM_ID
from smolvm_async.errors import ConfigError, VMNotFoundError
from smolvm_async.foundation.locking import LockFile, is_locked, poll
from smolvm_async.foundation.log import current_vm, get_logger
from smolvm_async.foundation.tasks import in_background, in_thread
from smolvm_async.host.identity import Relation
from smolvm_async.host.usage import read_usage
from smolvm_async.state.directory import (
    VMDirectory,
    cannot_use,
    empty,
    find_directory,
    read_each,
)
from smolvm_async.state.names import MARKS
from smolvm_async.state.orphans import end_orphans
from smolvm_async.state.record import Record, read_record
from smolvm_async.state.status import Status

logger = get_logger(__name__)

DYING = 10.0  # seconds to wait until the last thread of a dead owner releases the lock
LOCK = "max_memory.lock"  # in the data directory; a VM cannot have this id


@dataclass(frozen=True)
class VMInfo:
    """Information about one VM, read from the VM's directory.

    Attributes:
        vm_id: The VM's id.
        os: The guest OS.
        status: See `Status`; `orphaned` if its owner is dead, `elsewhere` if it is on another host.
        owner: The owner's process id; `None` if the VM has no owner, or if the owner is dead.
        age: Seconds since the VM was created.
        memory: The guest's memory in MiB.
        keep: Whether the VM stays when its owner ends.
        image: The image that the VM was made from; empty for the built-in Linux.
        host: The name of the other host that the VM belongs to; `None` for a VM of this host.
        labels: The labels that were given to the VM.
        resident: MiB of the host's memory that the VM's processes use now; `None` if they do not
            run on this host. The memory that clones share counts for each of them.
        processors: The number of the host's processors that they have used on average since they
            started; `None` likewise.
    """

    vm_id: str
    os: str
    status: Status
    owner: int | None
    age: float
    memory: int
    keep: bool
    image: str
    host: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    resident: int | None = None
    processors: float | None = None


async def list_vms(data_dir: Path, labels: Mapping[str, str]) -> list[VMInfo]:
    """Return the VMs in `data_dir` that have these `labels`, the oldest first.

    Delete the VMs whose time is over. Do not disturb the others.
    """
    infos, expired = await in_thread(_look, data_dir, labels)
    for vm_id in expired:
        await _prune_or_warn(VMDirectory(data_dir, vm_id))
    return sorted(infos, key=lambda info: -info.age)


def _look(data_dir: Path, labels: Mapping[str, str]) -> tuple[list[VMInfo], list[str]]:
    """Return the VMs that have these labels, and the ids of the VMs whose time is over."""
    infos, expired = [], []
    for record, status in survey(data_dir):
        if record.expired and status is not Status.ELSEWHERE:
            expired.append(record.config.vm_id)
        elif labels.items() <= record.config.labels.items():
            infos.append(describe(record, status))
    return infos, expired


def describe(record: Record, status: Status) -> VMInfo:
    """Return the information in a record; `status` is from `Record.status_seen()`."""
    config = record.config
    elsewhere = status is Status.ELSEWHERE and record.host is not None
    usage = read_usage(record.processes_here)
    return VMInfo(
        vm_id=config.vm_id,
        os=config.os,
        status=status,
        owner=record.owner.pid if record.owner and status is not Status.ORPHANED else None,
        age=max(0.0, (time.time_ns() - record.created) / 1e9),
        memory=config.memory,
        keep=config.keep,
        image=config.image,
        host=record.host.name if record.host is not None and elsewhere else None,
        labels=config.labels,
        resident=usage.resident if usage is not None else None,
        processors=round(usage.processors, 3) if usage is not None else None,
    )


def survey(data_dir: Path) -> Iterator[tuple[Record, Status]]:
    """Yield the record of every VM, and the VM's status."""
    return read_each(_directories(data_dir), _read)


def _read(path: Path, fd: int) -> tuple[Record, Status] | None:
    held = is_locked(fd)  # before reading the record: an owner writes it, then unlocks
    record = read_record(path, fd)
    return (record, record.status_seen(fd, held=held)) if record is not None else None


async def prune_vms(data_dir: Path, gone_host: str | None = None) -> list[VMInfo]:
    """Remove the VMs of dead owners from `data_dir`; return their information from before.

    Kept VMs stay and become `stopped`. Processes that dead owners left running are killed. The
    owners on the host with the name `gone_host` are dead; other hosts' VMs stay. Also remove the
    VMs whose time is over, and what killed processes left of snapshots.
    """
    # list() does not need them
    from smolvm_async.state.snapshot_directory import remove_leftovers
    from smolvm_async.state.snapshots import SNAPSHOTS

    await in_background(remove_leftovers, data_dir / SNAPSHOTS)
    await in_thread(_remove_stale_lock, data_dir / LOCK)
    pruned = []
    for path in await in_thread(lambda: list(_directories(data_dir))):
        info = await _prune_or_warn(VMDirectory(data_dir, path.name, gone_host))
        pruned += [info] if info is not None else []
    return pruned


async def _prune_or_warn(state: VMDirectory) -> VMInfo | None:
    token = current_vm.set(state.path.name)
    try:
        return await _prune(state)
    except VMNotFoundError:
        return None  # another process has removed it meanwhile
    except (ConfigError, OSError) as error:
        logger.warning("not pruned: %s", error)
        return None
    finally:
        current_vm.reset(token)


async def _prune(state: VMDirectory) -> VMInfo | None:
    try:
        # A killed owner holds the lock until its last thread has ended.
        await poll(lambda: state.try_hold(False) or not state.owner_is_dead, DYING)
        if state.fd < 0:
            return await _end_expired(state.path)
        record = state.record
        if record is None or (record.owner is None and not record.expired):
            return None
        info = describe(record, record.status_seen(state.fd, held=False))
        await state.end_orphans()
        if record.config.keep and record.machine is not None and not record.expired:
            await in_thread(state.write, record.at_rest(Status.STOPPED))
        else:
            await in_thread(state.remove)
        return info
    finally:
        # This also removes the directory of an owner that died before it wrote a record.
        await in_thread(state.abandon)


async def _end_expired(path: Path) -> VMInfo | None:
    """End a VM whose time is over although its owner lives, and return its information.

    The owner may hang, or be stopped. It has the lock, so only the owner or a later `prune()` can
    remove the directory, but until then only the record is left in it.
    """
    fd = find_directory(path)  # another VM may be at this path later
    try:
        record = await in_thread(read_record, path, fd)
        if record is None or not record.expired or record.relation is not Relation.SAME_PIDS:
            return None
        info = describe(record, record.status)
        await end_orphans(record.processes_here, fd)
        await in_thread(empty, Path(f"/proc/self/fd/{fd}"), MARKS)
        return info
    finally:
        os.close(fd)


def _remove_stale_lock(path: Path) -> None:
    lock = LockFile(path)
    if path.exists() and lock.try_lock():
        lock.unlock()


def _directories(data_dir: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(data_dir), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_use(data_dir, error) from error
    for entry in entries:
        if re.fullmatch(VM_ID, entry.name) and entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)
