"""Find a VM by its id: attach to its owner, or become the owner of a VM that has none."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from smolvm_async.errors import VMNotRunningError
from smolvm_async.foundation.locking import is_locked
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.state.directory import cannot_use, elsewhere, find_directory, not_found
from smolvm_async.state.record import Record, expired, read_record
from smolvm_async.state.status import Status
from smolvm_async.vm.attach.client import AttachedVM
from smolvm_async.vm.owner import OwnedVM
from smolvm_async.vm.plan import Plan, make_plan

ANSWER = 5.0  # seconds that an owner may need to start or stop the VM
POLL = 0.01  # seconds between two attempts


async def find(
    path: Path, on_progress: ProgressCallback | None, password: str | None = None
) -> OwnedVM | AttachedVM:
    """Return the VM whose directory is `path`. A VM that starts again may need a password.

    Raises:
        VMNotFoundError: `path` is not the directory of a VM.
        VMElsewhereError: The VM belongs to another host.
        VMExpiredError: The time of the VM is over.
        VMNotRunningError: The owner is alive but does not answer.
        ConfigError: The VM's record cannot be read.
    """
    deadline = time.monotonic() + ANSWER
    while True:
        fd = find_directory(path)
        try:
            held = is_locked(fd)
            try:
                record = await in_thread(read_record, path, fd)
            except OSError as error:
                raise cannot_use(path, error) from error
            if record is None and not held:
                raise not_found(path)
            if record is not None and record.is_elsewhere(fd):
                raise elsewhere(path, record.host.name if record.host is not None else "")
            if record is not None and record.expired:
                raise expired(record.config)
            held = held or (record is not None and record.is_used(fd, held=False))
            if record is not None and not held:
                return _at_rest(record, on_progress, password)
            if record is not None:
                _refuse_if_over(record)
                try:
                    return await AttachedVM.connect(path, fd, record)
                except OSError:
                    pass  # the owner does not listen yet, or has stopped listening
        finally:
            os.close(fd)
        if time.monotonic() > deadline:
            owner = record.owner.pid if record and record.owner else "?"
            raise VMNotRunningError(
                f"{path.name} is in use by process {owner}, whose event loop does not answer: "
                "wait for that process, or end it."
            )
        await asyncio.sleep(POLL)


def _at_rest(record: Record, on_progress: ProgressCallback | None, password: str | None) -> OwnedVM:
    config = record.config.model_copy(update={"password": password})

    async def plan() -> Plan:  # only start() calls this: other methods need no image
        return make_plan(config, on_progress)

    if record.owner is not None:
        record = record.model_copy(update={"status": Status.ORPHANED})
    return OwnedVM(config, plan, record)


def _refuse_if_over(record: Record) -> None:
    owner, over = record.owner, record.status in (Status.STOPPED, Status.CRASHED)
    if over and owner is not None and not record.owner_is_dead:
        raise VMNotRunningError(
            f"{record.config.vm_id} is {record.status}, but its owner, process {owner.pid}, has "
            "not deleted it yet: wait until that process deletes the VM or ends."
        )
