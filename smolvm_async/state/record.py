"""The record in a VM's directory: what the VM is, who owns it, and which processes it has."""

from __future__ import annotations

import errno
import json
import os
import stat
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smolvm_async.config.source import Source
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.files import replace_file
from smolvm_async.foundation.process import Identity

RECORD, NEW_RECORD = "vm.json", "vm.json.new"
SCHEMA_VERSION = 1
MAX_SIZE = 1 << 20  # bytes


class Status(StrEnum):
    """What a VM is doing.

    PAUSED: the guest's processors stand still, by `pause()` or because QEMU could not write its
    disk. ORPHANED: its owner has died without stopping it; `prune()`, or its own next `start()`,
    removes what is left of it, or makes a kept VM `stopped`.
    """

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    CRASHED = "crashed"
    ORPHANED = "orphaned"
    DELETED = "deleted"


ACTIVE = (  # it has, or may have, processes
    Status.STARTING,
    Status.RUNNING,
    Status.PAUSED,
    Status.STOPPING,
)


class Machine(NamedTuple):
    """What has to stay the same for a kept VM, besides what its id decides (UUID and MAC).

    Attributes:
        type: QEMU's versioned machine type.
        image_size: Bytes of the image that the overlay was made for, and ...
        image_mtime_ns: ... when it had been written to: any later change would corrupt the disk.
        source: What it starts from; a newer built-in image would be another disk.
    """

    type: str
    image_size: int
    image_mtime_ns: int
    source: Source | None = None


class Record(BaseModel):
    """One VM, as its directory describes it.

    Attributes:
        config: Its arguments.
        created: When it was made, in nanoseconds since the epoch; no two VMs of one id share it.
        status: What its owner last said.
        owner: The process that holds it; `None` if nobody does.
        processes: Its processes by name.
        machine: Once a kept VM has run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    config: VMConfig
    created: Annotated[int, Field(ge=0, lt=1 << 63)]
    status: Status = Status.STARTING
    owner: Identity | None = None
    processes: dict[str, Identity] = {}
    machine: Machine | None = None

    def status_seen(self, *, held: bool) -> Status:
        """What the VM is doing, given whether somebody holds its directory."""
        return Status.ORPHANED if self.owner is not None and not held else self.status

    def to_json(self) -> bytes:
        """As the file holds it; ASCII, since a path may not be UTF-8."""
        return json.dumps(self.model_dump(), default=os.fspath, indent=1).encode()


def read_record(directory: Path, dir_fd: int) -> Record | None:
    """The record in the open directory `dir_fd`, which is at `directory`; `None` if it has none.

    Raises:
        ConfigError: If it is damaged.
        OSError: If it cannot be read now.
    """
    try:
        fd = os.open(
            RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES):
            raise _unreadable(directory, str(error.strerror)) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _unreadable(directory, "it is no regular file")
        content = os.read(fd, MAX_SIZE)
    finally:
        os.close(fd)
    try:
        values: Any = json.loads(content)
        if values["schema_version"] != SCHEMA_VERSION:
            raise _unreadable(directory, "another version of this library wrote it")
        # It is where we found it, wherever it was made.
        values["config"] |= {"data_dir": directory.parent, "vm_id": directory.name}
        return Record(**values)
    except (ValueError, TypeError, KeyError, RecursionError, ValidationError) as error:
        if isinstance(error, ConfigError) and RECORD in str(error):
            raise
        raise _unreadable(directory, "it is damaged") from error


def write_record(record: Record, dir_fd: int) -> None:
    """Replace the record, at once and as a whole.

    Raises:
        OSError: If the disk is full.
    """
    replace_file(RECORD, record.to_json(), temporary=NEW_RECORD, mode=0o600, dir_fd=dir_fd)


def _unreadable(directory: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{str(directory / RECORD)!r} cannot be read as the record of a VM: {reason}. "
        "Remove the directory if it is of no use."
    )
