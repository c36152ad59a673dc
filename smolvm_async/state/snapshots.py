"""Snapshots on disk: make a snapshot, check and use it, list and delete snapshots.

A snapshot is a directory with the layers of the VM's disk, which are never written again, copies of
other files of the VM's directory, a record, and for a VM that ran, the guest's memory (`ram`) and
the state of the devices (`machine`). The layers are hard links: the data of a layer exist until the
last VM and the last snapshot that need the layer are deleted.

A snapshot may come from a stranger, as an image may. So the record is checked like arguments, the
files have fixed names, and no link is followed. The facts in the record show whether the files
still belong together; they do not prove who has made the snapshot.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncIterator, Container, Iterator
from pathlib import Path

from smolvm_async.config.checks import VM_ID, check_snapshot_name
from smolvm_async.foundation.entries import copy, link_or_copy, names_in, open_regular
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import acquired, in_background
from smolvm_async.state.directory import (
    Lease,
    VMDirectory,
    cannot_use,
    discard,
    is_at,
    read_each,
)
from smolvm_async.state.names import LAYER, TPM
from smolvm_async.state.record import to_json
from smolvm_async.state.snapshot_directory import (
    delete_directory,
    explained,
    final_path,
    is_of_fork,
    make_directory,
    name_directory,
    not_found,
    remove_directory,
    remove_leftovers,
    share_directory,
)
from smolvm_async.state.snapshot_record import (
    MACHINE,
    RAM,
    RECORD,
    TPM_FILE,
    FileFacts,
    SnapshotInfo,
    SnapshotRecord,
    read_snapshot,
    unusable,
)

logger = get_logger(__name__)

SNAPSHOTS = ".snapshots"  # in the data directory; a VM cannot have this id
RESTORE = "Restore the file with the time of its last change, or delete the snapshot."


class Snapshot:
    """A locked snapshot. The methods read and write files: call them in a thread.

    Attributes:
        path: The path of the directory. It changes if the snapshot is deleted: see `place`.
        record: The record.
    """

    record: SnapshotRecord

    def __init__(self, path: Path, lease: Lease) -> None:
        self.path = path
        self._lease = lease

    @property
    def fd(self) -> int:
        """The descriptor of the locked directory; -1 without the lock, and in a forked child."""
        return self._lease.fd

    @property
    def place(self) -> Path:
        """A path that leads to the directory, even if the snapshot is deleted meanwhile."""
        return Path(f"/proc/self/fd/{self.fd}")

    def open(self, name: str) -> int:
        """Open a file for reading, if it is unchanged; the caller closes the descriptor.

        This compares size and time; the hashes were compared when the snapshot was locked.

        Raises:
            SnapshotError: The file is missing, was changed, or cannot be opened.
        """
        facts = self.record.files.get(name)
        if facts is None:
            raise unusable(self.path, f"it has no file {name!r}")
        try:
            fd = open_regular(name, self.fd)
        except FileNotFoundError:
            raise unusable(self.path, f"{name!r} is missing") from None
        except OSError as error:
            raise unusable(self.path, f"{name!r} cannot be opened ({error.strerror})") from error
        try:
            if change := facts.change(os.fstat(fd)):
                raise unusable(self.path, f"{name!r} {change}")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def give(self, directory: VMDirectory, but: Container[str] = ()) -> None:
        """Link the layers into a VM's directory, and copy all other files.

        Args:
            but: Files to leave out, besides `ram` and `machine`.

        Raises:
            SnapshotError: A file is missing or was changed.
            OSError: The VM's directory has such a file already, or its disk is full.
        """
        for name in self.record.files:
            if name not in (RAM, MACHINE) and name not in but:
                _put(self.open(name), name, directory.fd)


class NewSnapshot(Snapshot):
    """A snapshot that is being made. `list_snapshots()` does not show it before `finish()`."""

    def link(self, directory_fd: int, name: str) -> None:
        """Add a layer of a VM's disk as a hard link; nobody may write to the layer any more.

        Between file systems, and where a link is refused, this makes a copy.

        Raises:
            SnapshotError: The layer is missing, or the disk is full.
        """
        with explained(self.path):
            _put(open_regular(name, directory_fd), name, self.fd)

    def copy(self, directory_fd: int, name: str) -> None:
        """Copy a file of a VM's directory, or if `name` is the TPM's directory, its files.

        Raises:
            SnapshotError: The file is missing, or the disk is full.
        """
        with explained(self.path):
            files = [name] if name != TPM else names_in(TPM, directory_fd)
            for file in files:
                if name != TPM or re.search(TPM_FILE, file):  # swtpm's lock is not state
                    _put(open_regular(file, directory_fd), file, self.fd)

    def complete(self, record: SnapshotRecord, *, durable: bool = False) -> None:
        """Set the record, add the facts about all files, and remove files that do not belong here.

        Afterwards `open()` and `give()` work, so forks do not need `finish()`.

        Args:
            durable: Whether to flush the files to the disk.

        Raises:
            SnapshotError: A file is missing, or the disk is full.
        """
        facts = {}
        with explained(self.path):
            for name in (*names_in(".", self.fd), *(() if record.live else names_in(TPM, self.fd))):
                if record.belongs(name):
                    facts[name] = _seal(name, self.fd, durable=durable)
                elif record.live or name != TPM:
                    discard(self.path / name)
            self.record = record.with_facts(facts)
        self.record.check(self.path)

    def finish(self, record: SnapshotRecord) -> SnapshotInfo:
        """Complete the snapshot on the disk, give it its name, and release the lock.

        Raises:
            SnapshotExistsError: Another snapshot has got the name meanwhile.
            SnapshotError: A file is missing, or the disk is full.
        """
        self.complete(record, durable=True)
        path = final_path(self.path)
        with explained(path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open(RECORD, flags, 0o600, dir_fd=self.fd), "wb") as file:
                file.write(to_json(self.record))
            _seal(RECORD, self.fd, durable=True)
            os.fsync(self.fd)
            info = SnapshotInfo.of(path.name, self.record, self.fd)
            name_directory(self.path, self._lease)
        return info

    def close(self) -> None:
        """Remove the directory and release the lock, unless `finish()` has released the lock."""
        try:
            if self.fd >= 0:
                remove_directory(self.path, self._lease)
        except OSError as error:
            logger.warning("%s", cannot_use(self.path, error))  # later calls try again
        finally:
            self._lease.close()


class HeldSnapshot(Snapshot):
    """A snapshot in use: all files stay until `close()`, even if the snapshot is deleted."""

    def close(self) -> None:
        """Release the lock; remove the files if the snapshot was deleted meanwhile."""
        deleted = self.fd >= 0 and not is_at(self.fd, self.path)
        self._lease.close()
        if deleted:
            remove_leftovers(self.path.parent)


@contextlib.asynccontextmanager
async def new_snapshot(root: Path, name: str) -> AsyncIterator[NewSnapshot]:
    """Make a directory for a new snapshot; remove the directory unless `finish()` succeeds.

    Args:
        root: The directory that has the snapshots.

    Raises:
        SnapshotExistsError: The name is taken.
        SnapshotError: The directory cannot be made.
        ConfigError: `name` is not a name, or other users can write to `root`.
    """
    making = in_background(_make, root / check_snapshot_name(name))
    async with acquired(making, lambda new: in_background(new.close)) as new:
        yield new


@contextlib.asynccontextmanager
async def held_snapshot(root: Path, name: str) -> AsyncIterator[HeldSnapshot]:
    """Check the record and all files of a snapshot, and hold the snapshot during the block.

    This does not read `ram`, the layers, and files of more than 16 MiB: a change that keeps the
    size and the time of one of them is not noticed. The caller checks that the layers are layers,
    and that the base image is unchanged.

    Args:
        root: The directory that has the snapshots.

    Raises:
        SnapshotNotFoundError: No snapshot has this name.
        SnapshotError: The snapshot is damaged, or another user can change it.
    """
    holding = in_background(_hold, root / check_snapshot_name(name))
    async with acquired(holding, lambda held: in_background(held.close)) as held:
        yield held


async def list_snapshots(root: Path) -> list[SnapshotInfo]:
    """Return the snapshots in `root`, the oldest first; log a warning for a damaged snapshot."""

    def find() -> list[SnapshotInfo]:
        remove_leftovers(root)
        return [info for _, info in survey_snapshots(root) if not is_of_fork(info.name)]

    return sorted(await in_background(find), key=lambda info: -info.age)


async def delete_snapshot(root: Path, name: str) -> None:
    """Delete a snapshot; the files stay while a VM is being made from the snapshot.

    Raises:
        SnapshotNotFoundError: No snapshot has this name.
    """
    await in_background(delete_directory, root / check_snapshot_name(name))


def survey_snapshots(root: Path) -> Iterator[tuple[SnapshotRecord, SnapshotInfo]]:
    """Yield the record of every snapshot in `root`, and the information about the snapshot."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_use(root, error) from error
    paths = (root / name for name in sorted(names) if re.fullmatch(VM_ID, name))
    yield from read_each(paths, _read)


def _read(path: Path, fd: int) -> tuple[SnapshotRecord, SnapshotInfo] | None:
    record = read_snapshot(path, fd)
    return (record, SnapshotInfo.of(path.name, record, fd)) if record is not None else None


def _make(path: Path) -> NewSnapshot:
    with explained(path):
        return NewSnapshot(*make_directory(path))


def _hold(path: Path) -> HeldSnapshot:
    with explained(path):
        held = HeldSnapshot(path, share_directory(path))
        try:
            record = read_snapshot(path, held.fd)
            if record is None:
                raise not_found(path)
            held.record = record
            for name, facts in record.files.items():
                fd = held.open(name)
                try:
                    if FileFacts.of(name, fd) != facts:
                        raise unusable(path, f"{name!r} has another content (SHA-256)")
                finally:
                    os.close(fd)
            for file, facts in zip(record.boot_paths, record.boot_files, strict=True):
                if not file.is_file() or facts.change(file.stat()):
                    raise unusable(path, f"{str(file)!r} is missing, or was changed", RESTORE)
        except BaseException:
            held.close()
            raise
    return held


def _put(source: int, name: str, dir_fd: int) -> None:
    """Link a layer that is open as `source` to a directory, or copy another file; close it."""
    try:
        if re.search(LAYER, name):
            link_or_copy(source, name, dir_fd)
        else:
            if parent := os.path.dirname(name):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(parent, 0o700, dir_fd=dir_fd)
            copy(source, name, dir_fd)
    finally:
        os.close(source)


def _seal(name: str, dir_fd: int, *, durable: bool) -> FileFacts:
    """Make a finished file private, flush it to the disk if `durable`, and return its facts."""
    fd = open_regular(name, dir_fd)
    try:
        os.fchmod(fd, 0o600)
        if durable:
            os.fsync(fd)
        return FileFacts.of(name, fd)
    finally:
        os.close(fd)
