"""All VMs of a data directory: what there is, and the removal of what dead owners left."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smolvm_async.config.checks import VM_ID
from smolvm_async.errors import ConfigError, VMNotFoundError
from smolvm_async.foundation.locking import LockFile, is_locked, poll
from smolvm_async.foundation.log import current_vm, get_logger
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.state.directory import NO_DIRECTORY, VMDirectory, cannot_use, open_directory
from smolvm_async.state.record import Record, Status, read_record

logger = get_logger(__name__)

DYING = 2.0  # seconds for a dead owner's last thread to let go of the lock
LOCK = "max_memory.lock"  # in the data directory, where no VM can have that id


@dataclass(frozen=True)
class VMInfo:
    """One VM, as its directory describes it.

    Attributes:
        vm_id: Its id.
        os: The guest OS.
        status: What it is doing; `orphaned` if its owner has died.
        owner: The process id of its owner; `None` if it has none, or a dead one.
        age: Seconds since it was made.
        memory: MiB.
        keep: Whether it outlives its owner.
        image: The image that it was made from.
    """

    vm_id: str
    os: str
    status: Status
    owner: int | None
    age: float
    memory: int
    keep: bool
    image: str


async def list_vms(data_dir: Path) -> list[VMInfo]:
    """Every VM in `data_dir`, the oldest first; looking disturbs none of them."""
    infos = await in_thread(lambda: [describe(*found) for found in survey(data_dir)])
    return sorted(infos, key=lambda info: -info.age)


def describe(record: Record, held: bool) -> VMInfo:
    """What a record tells, given whether somebody holds its directory."""
    config = record.config
    return VMInfo(
        vm_id=config.vm_id,
        os=config.os,
        status=record.status_seen(held=held),
        owner=record.owner.pid if record.owner is not None and held else None,
        age=max(0.0, (time.time_ns() - record.created) / 1e9),
        memory=config.memory,
        keep=config.keep,
        image=config.image,
    )


def survey(data_dir: Path) -> Iterator[tuple[Record, bool]]:
    """The record of every VM, and whether somebody holds its directory."""
    for path in _directories(data_dir):
        try:
            fd = open_directory(path)
        except OSError as error:
            if error.errno in (*NO_DIRECTORY, errno.EACCES):
                continue  # removed meanwhile, or not ours
            raise cannot_use(path, error) from error
        try:
            held = is_locked(fd)  # first: who has just let go has written the record before
            record = read_record(path, fd)
        except ConfigError as error:
            logger.warning("%s", error)
            continue
        except OSError as error:
            raise cannot_use(path, error) from error
        finally:
            os.close(fd)
        if record is not None:
            # The last thread of an owner that was killed may have the lock for a moment yet.
            yield record, held and (record.owner is None or record.owner.alive)


async def prune_vms(data_dir: Path) -> list[VMInfo]:
    """End and remove what dead owners left in `data_dir`; kept VMs become `stopped` and stay.

    What a living process holds is left alone.

    Returns:
        What was found, as it was before.
    """
    await in_thread(_remove_stale_lock, data_dir / LOCK)
    pruned = []
    for path in await in_thread(lambda: list(_directories(data_dir))):
        token = current_vm.set(path.name)
        try:
            info = await _prune(VMDirectory(data_dir, path.name))
        except VMNotFoundError:
            pass  # its owner, or another prune(), was faster
        except (ConfigError, OSError) as error:
            logger.warning("not pruned: %s", error)
        else:
            pruned += [info] if info is not None else []
        finally:
            current_vm.reset(token)
    return pruned


async def _prune(state: VMDirectory) -> VMInfo | None:
    try:
        # An owner that was killed holds the lock until its last thread has ended.
        await poll(lambda: state.try_hold(False) or not state.owner_is_dead, DYING)
        if state.fd < 0:
            return None
        record = state.record
        if record is None or record.owner is None:
            return None
        await state.end_orphans()
        if record.config.keep and record.machine is not None:
            await in_thread(state.write, at_rest(record, Status.STOPPED))
        else:
            await in_thread(state.remove)
        return describe(record, held=False)
    finally:
        await in_thread(state.abandon)  # also if its owner died as it began


def _remove_stale_lock(path: Path) -> None:
    lock = LockFile(path)
    if path.exists() and lock.try_lock():
        lock.unlock()


def at_rest(record: Record, status: Status) -> Record:
    """The record of a VM that nobody holds and that has no process."""
    return record.model_copy(update={"status": status, "owner": None, "processes": {}})


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
