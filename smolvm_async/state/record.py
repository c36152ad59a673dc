"""The record in a VM's directory: the VM's configuration, status, owner and processes."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from smolvm_async.config.checks import VM_ID
from smolvm_async.config.source import Source
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import ConfigError, VMExpiredError
from smolvm_async.foundation.entries import open_regular
from smolvm_async.foundation.locking import excludes_others
from smolvm_async.foundation.process import Identity
from smolvm_async.host.identity import HostIdentity, Relation, relation, this_host
from smolvm_async.state.names import LAYER, OVERLAY, RECORD
from smolvm_async.state.status import Status

SCHEMA_VERSION = 5  # with each new field, increase the number: earlier versions refuse it
READABLE = (1, 2, 3, 4, 5)  # 1 has no `host`, 2 no `layers`, 3 no `internet_settings`, 4 no `ttl`
MAX_SIZE = 1 << 20  # bytes
MAX_LAYERS = 64  # each layer takes QEMU memory, and time for each read


# QEMU gets these texts in its options, or opens the file: a record may come from a stranger.
MachineType = Annotated[str, Field(pattern=r"^[A-Za-z0-9._+-]{1,64}$")]
Layers = Annotated[
    tuple[Annotated[str, Field(pattern=LAYER)], ...], Field(min_length=1, max_length=MAX_LAYERS)
]
Time = Annotated[int, Field(ge=0, lt=1 << 63)]  # ns since the epoch
M = TypeVar("M", bound=BaseModel)


class Machine(NamedTuple):
    """The facts that must not change for a kept VM, or for the clones of a snapshot.

    Attributes:
        type: QEMU's versioned machine type.
        image_size: The size in bytes of the image that the overlay is based on.
        image_mtime_ns: The time of the image's last change: a later change would corrupt the disk.
        source: The image's files: a newer built-in image would be a different disk.
        identity: The id that the UUID and the MAC address follow from: of a clone, the id of the
            VM that booted; empty for the VM's own id.
        layers: The files of the disk, bottom to top: each has the differences from the layer below,
            the first one from the image. The VM writes to the last one only.
    """

    type: MachineType
    image_size: int
    image_mtime_ns: int
    source: Source | None = None
    identity: Annotated[str, Field(pattern=rf"^({VM_ID})?$")] = ""
    layers: Layers = (OVERLAY,)


class Record(BaseModel):
    """The record of one VM, which is stored in the VM's directory.

    Attributes:
        config: The VM's arguments.
        created: The creation time, in ns since the epoch; distinguishes VMs with the same id.
        status: The status that the owner wrote last; see `status_seen`.
        owner: The process that runs the VM; `None` while the VM is stopped.
        processes: The VM's processes by name.
        host: The host on which owner and processes have their ids; `None` while the VM is stopped,
            and in records of earlier versions.
        machine: The facts about the VM's machine; `None` until a kept VM has run.
    """

    # The first start builds the validator, in a thread: not the import.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    schema_version: int = SCHEMA_VERSION
    config: VMConfig
    created: Time
    status: Status = Status.STARTING
    owner: Identity | None = None
    processes: dict[str, Identity] = {}
    host: HostIdentity | None = None
    machine: Machine | None = None

    @property
    def expired(self) -> bool:
        """True if the VM's time, its `ttl`, is over."""
        left = self.seconds_left
        return left is not None and left <= 0

    @property
    def seconds_left(self) -> float | None:
        """The seconds until the VM's time is over; `None` if it has no `ttl`."""
        ttl = self.config.ttl
        return None if ttl is None else self.created / 1e9 + ttl - time.time()

    @property
    def relation(self) -> Relation:
        """How the host of the VM's owner is related to this host."""
        return relation(self.host, this_host())

    @property
    def owner_is_dead(self) -> bool:
        """True if the record names an owner that certainly has ended, whoever holds the lock."""
        if self.owner is None:
            return False
        related = self.relation
        dead = related is Relation.SAME_PIDS and not self.owner.alive
        return dead or related is Relation.EARLIER_BOOT

    @property
    def processes_here(self) -> list[Identity]:
        """The VM's processes, if their ids mean the same processes here."""
        return [*self.processes.values()] if self.relation is Relation.SAME_PIDS else []

    def is_elsewhere(self, dir_fd: int) -> bool:
        """Return whether nothing here can tell if the owner lives; `dir_fd` is the directory."""
        return self.owner is not None and beyond_reach(self.relation, dir_fd)

    def is_used(self, dir_fd: int, *, held: bool) -> bool:
        """Return whether an owner on this host lives; `held` tells whether a process has the lock.

        The lock may be free although the owner has it: a file system that is mounted twice may have
        locks for each mount, or locks have no effect in the directory `dir_fd`. Then the process
        ids tell, unless this process is the owner: it may have dropped the VM.
        """
        if self.owner is None:
            return False
        if self.relation is not Relation.SAME_PIDS:
            return held
        lives = self.owner.alive
        if held or not lives:
            return lives
        runs = any(process.alive for process in self.processes.values())
        return (runs and self.owner.pid != os.getpid()) or not excludes_others(dir_fd)

    def status_seen(self, dir_fd: int, *, held: bool) -> Status:
        """Return the status; `held` tells whether a process has locked the directory `dir_fd`."""
        if self.is_elsewhere(dir_fd):
            return Status.ELSEWHERE
        used = self.owner is None or self.is_used(dir_fd, held=held)
        return self.status if used else Status.ORPHANED

    def at_rest(self, status: Status) -> Self:
        """Return the record with a new status, and without owner, processes and host."""
        update: dict[str, object] = {"status": status, "owner": None, "processes": {}, "host": None}
        return self.model_copy(update=update)

    def to_json(self) -> bytes:
        """See `to_json()`."""
        return to_json(self)


def expired(config: VMConfig) -> VMExpiredError:
    """Return the error for a VM whose time is over."""
    return VMExpiredError(
        f"The time of {config.vm_id} is over: it is deleted {config.ttl:g} s (ttl=) after its "
        "first start. Make a new VM, or pass a larger ttl=."
    )


def beyond_reach(related: Relation, dir_fd: int) -> bool:
    """Return whether a free lock on `dir_fd` does not prove that the other process is dead."""
    if related in (Relation.SAME_PIDS, Relation.ANOTHER_HOST):
        return related is Relation.ANOTHER_HOST
    return not excludes_others(dir_fd)


def to_json(record: BaseModel) -> bytes:
    """Return a record as JSON, in ASCII: a path may contain bytes that are not UTF-8."""
    return json.dumps(record.model_dump(), default=os.fspath, indent=1).encode()


class RecordError(ValueError):
    """A record cannot be read. The message continues a sentence that begins with its name."""


def read_json(
    model: type[M], name: str, dir_fd: int, readable: Container[int], **config: object
) -> M | None:
    """Read a record with a `schema_version` and a `config`; return `None` if it is missing.

    Args:
        model: The record's type.
        readable: The versions that can be read.
        config: Values that replace the values in the record's `config`.

    Raises:
        RecordError: If the record is damaged, or of another version.
        OSError: If the record cannot be read at the moment.
    """
    try:
        fd = open_regular(name, dir_fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES):
            raise RecordError(str(error.strerror)) from error
        raise
    try:
        content = os.read(fd, MAX_SIZE)
    finally:
        os.close(fd)
    try:
        values: Any = json.loads(content)
        known = model.model_fields.keys() | VMConfig.model_fields.keys()
        unknown = {*values, *values["config"]} - known
        other = values["schema_version"] not in readable or unknown
        values["config"] |= {} if other else config
        record = None if other else model(**values)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RecordError("it is damaged") from error
    if record is None:
        raise RecordError("another version of this library wrote it; use that one")
    return record


def read_record(directory: Path, dir_fd: int) -> Record | None:
    """Read the record in `directory` (open as `dir_fd`); return `None` if there is no record.

    Raises:
        ConfigError: If the record is damaged.
        OSError: If the record cannot be read at the moment.
    """
    try:
        # The directory may have been moved since the record was written.
        here = {"data_dir": directory.parent, "vm_id": directory.name}
        return read_json(Record, RECORD, dir_fd, READABLE, **here)
    except RecordError as error:
        raise ConfigError(
            f"The VM's record {str(directory / RECORD)!r} cannot be read: {error}. "
            "Remove the directory if you do not need the VM."
        ) from error
