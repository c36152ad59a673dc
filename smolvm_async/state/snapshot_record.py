"""The record of a snapshot: the VM that goes on from it, and the facts about the files."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from smolvm_async.config.checks import check_labels, encoded
from smolvm_async.config.options import recheck
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import SnapshotError
from smolvm_async.foundation.files import remembered, sha256_of
from smolvm_async.state.directory import is_at
from smolvm_async.state.names import (
    AUTHORIZED_KEYS,
    HOST_KEY,
    KNOWN_HOST,
    LAYER,
    SEED,
    SSH_KEY,
    TPM,
    VARS,
)
from smolvm_async.state.record import Machine, RecordError, Time, read_json

RECORD = "snapshot.json"
RAM = "ram"  # the guest's memory
MACHINE = "machine"  # the state of the processors and devices
COPIED = (VARS, SEED, SSH_KEY, HOST_KEY, AUTHORIZED_KEYS, KNOWN_HOST)
TPM_FILE = rf"^{TPM}/[A-Za-z0-9_-][A-Za-z0-9._-]{{0,63}}$"
SCHEMA_VERSION = 3
READABLE = (1, 2, 3)  # in their `config`, 1 has no `internet_settings`, 2 no `ttl`
HASHED = 16 << 20  # bytes; each use of the snapshot would read a larger file
AGAIN = (
    "Take the snapshot again, or copy the whole directory again together with the times of the "
    "files: cp -a, or rsync -a."
)

_hash_of = remembered(sha256_of)  # a fleet reads the files of its snapshot only once

Text = Annotated[str, Field(pattern=r"^[ -~]*$", max_length=1 << 16)]


class FileFacts(NamedTuple):
    """The facts about a file that must not change; `ram`, layers and large files have no hash."""

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, name: str, fd: int) -> FileFacts:
        """Return the facts about an open file."""
        status = os.fstat(fd)
        hashed = status.st_size <= HASHED and name != RAM and not re.search(LAYER, name)
        return cls(status.st_size, status.st_mtime_ns, _hash_of(fd) if hashed else "")

    def change(self, status: os.stat_result) -> str:
        """Return how size or time differ now, for the end of a message; empty if they are equal."""
        if status.st_size != self.size:
            return f"has {status.st_size} bytes instead of {self.size}"
        if status.st_mtime_ns != self.mtime_ns:
            return "was changed (the time of its last change differs)"
        return ""


class SnapshotRecord(BaseModel):
    """The record of a snapshot.

    Attributes:
        config: The configuration of the VM that the snapshot was made of; after reading, its
            `data_dir` is the directory that has the snapshots.
        machine: The facts about the machine. The layers are files of the snapshot.
        created: The time of the snapshot, in ns since the epoch.
        live: Whether the VM was running, so that `ram` and `machine` exist.
        ready: Whether the guest was ready.
        accelerator: `kvm` or `tcg`.
        qemu: QEMU's version.
        processor: The processor that the guest saw.
        labels: The user's labels.
        files: The facts about each file, by name; `NewSnapshot` sets them.
        boot_files: The facts about the kernel and the initramfs that QEMU loads, without hashes;
            `NewSnapshot` sets them. A guest can read these files, so a stranger's record must not
            name others than the stranger had.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    schema_version: int = SCHEMA_VERSION
    config: VMConfig
    machine: Machine
    created: Time
    live: bool
    ready: bool
    accelerator: Annotated[str, Field(pattern=r"^[a-z]{1,16}$")]
    qemu: Text
    processor: Text
    labels: dict[str, str] = {}
    files: dict[str, FileFacts] = {}
    boot_files: tuple[FileFacts, ...] = ()

    @property
    def boot_paths(self) -> list[Path]:
        """The paths of `boot_files`."""
        source = self.machine.source
        return source.paths[1:] if source is not None else []  # without the image

    def with_facts(self, files: dict[str, FileFacts]) -> Self:
        """Return the record with the facts about the files."""
        found = [path.stat() for path in self.boot_paths]
        boot_files = tuple(FileFacts(status.st_size, status.st_mtime_ns, "") for status in found)
        return self.model_copy(update={"files": files, "boot_files": boot_files})

    def belongs(self, name: str) -> bool:
        """Return whether the snapshot may have a file of that name."""
        if name in (*self.machine.layers, *COPIED):
            return True
        return name in (RAM, MACHINE) if self.live else re.search(TPM_FILE, name) is not None

    def check(self, path: Path) -> None:
        """Check the values, and that they belong together; `path` is the snapshot's directory.

        Raises:
            SnapshotError: A value is wrong.
        """
        try:
            recheck(self.config)
            check_labels(self.labels)
        except ValueError as error:
            raise unusable(path, f"its record is not usable: {error}".rstrip(".")) from error
        if (source := self.machine.source) is not None:
            names = encoded("".join((source.boot_args, *map(str, source.paths))))
            if source.format not in ("qcow2", "raw") or names is None or b"\0" in names:
                raise unusable(path, "its record does not describe an image's files")
        layers, live = self.machine.layers, (RAM, MACHINE) if self.live else ()
        if missing := {*layers, *live} - self.files.keys():
            raise unusable(path, f"{min(missing)!r} is missing")
        if len(self.boot_files) != len(self.boot_paths):
            raise unusable(path, "its record does not describe the kernel")
        if len({*layers}) < len(layers) or not all(map(self.belongs, self.files)):
            raise unusable(path, "its record lists files that do not belong to a snapshot")
        if self.live and self.files[RAM].size != self.config.memory << 20:
            raise unusable(path, f"{RAM!r} does not have the size of the guest's memory")


def read_snapshot(path: Path, fd: int) -> SnapshotRecord | None:
    """Read the record in `path` (open as `fd`); return `None` if there is no record.

    Raises:
        SnapshotError: If the record is damaged.
        OSError: If the record cannot be read at the moment.
    """
    here = {"data_dir": path.parent.parent}
    try:
        record = read_json(SnapshotRecord, RECORD, fd, READABLE, **here)
    except RecordError as error:
        raise unusable(path, f"its record {RECORD!r} cannot be read: {error}") from error
    if record is not None:
        record.check(path)
    elif is_snapshot(fd) and is_at(fd, path):  # and no other process deletes it now
        raise unusable(path, f"its record {RECORD!r} is missing")
    return record


def is_snapshot(fd: int) -> bool:
    """Return whether a directory is a snapshot's, although its record may be damaged or missing."""
    names = os.listdir(fd)
    own = (RAM, MACHINE, TPM, *COPIED)
    only_own = all(name in own or re.search(LAYER, name) for name in names)
    return RECORD in names or (bool(names) and only_own)


class SnapshotInfo(NamedTuple):
    """Information about one snapshot.

    Attributes:
        name: The snapshot's name.
        vm_id: The id of the VM that the snapshot was made of.
        os: The guest OS.
        image: The image that the VM was made from; empty for the built-in Linux.
        memory: The guest's memory in MiB.
        age: Seconds since the snapshot was made.
        live: Whether the VM was running: then a restored VM goes on, and does not boot.
        ready: Whether the guest was ready.
        accelerator: `kvm` or `tcg`.
        labels: The labels that were given to the snapshot.
        size: The bytes on disk that deleting the snapshot would free now. The layers that a VM or
            another snapshot also needs do not count.
    """

    name: str
    vm_id: str
    os: str
    image: str
    memory: int
    age: float
    live: bool
    ready: bool
    accelerator: str
    labels: dict[str, str]
    size: int

    @classmethod
    def of(cls, name: str, record: SnapshotRecord, fd: int) -> SnapshotInfo:
        """Return the information about the snapshot in the open directory `fd`."""
        size = 0
        for file in (*record.files, RECORD):
            with contextlib.suppress(OSError):
                status = os.stat(file, dir_fd=fd, follow_symlinks=False)
                size += status.st_blocks * 512 if status.st_nlink == 1 else 0
        config = record.config
        return cls(
            name=name,
            vm_id=config.vm_id,
            os=config.os,
            image=config.image,
            memory=config.memory,
            age=max(0.0, (time.time_ns() - record.created) / 1e9),
            live=record.live,
            ready=record.ready,
            accelerator=record.accelerator,
            labels=record.labels,
            size=size,
        )


def unusable(path: Path, reason: str, hint: str = AGAIN) -> SnapshotError:
    """Return the exception for a snapshot that cannot be used."""
    return SnapshotError(
        f"Snapshot {path.name!r} in {str(path.parent)!r} cannot be used: {reason}.", hint=hint
    )
