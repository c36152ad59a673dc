"""Snapshots on disk: make the directory of a snapshot, check and use it, list and delete it.

A snapshot is a directory with the layers of the VM's disk, which are never written again, copies of
other files of the VM's directory, a record, and for a VM that ran, the guest's memory (`ram`) and
the state of the devices (`machine`). The layers are hard links: the data of a layer exist until the
last VM and the last snapshot that need the layer are deleted.

A directory with the name of a snapshot is always whole: it has a temporary name while it is made,
and again before its files are removed. A process locks the directory while it makes, uses or
removes it, so any process may remove a directory that has a temporary name and is not locked. Users
share the lock, and find the files by the open directory. If the snapshot is deleted meanwhile, the
last user removes the files.

A snapshot may come from a stranger, as an image may. So the record is checked like arguments, the
files have fixed names, and no link is followed. The facts in the record show whether the files
still belong together; they do not prove who has made the snapshot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from smolvm_async.config.checks import VM_ID, check_snapshot_name
from smolvm_async.errors import SnapshotError, SnapshotExistsError, SnapshotNotFoundError
from smolvm_async.foundation.entries import copy, link_or_copy, names_in, open_regular
from smolvm_async.foundation.files import make_private
from smolvm_async.foundation.locking import try_lock
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import acquired, in_background
from smolvm_async.state.directory import (
    NO_DIRECTORY,
    Lease,
    VMDirectory,
    cannot_use,
    check_data_dir,
    discard,
    empty,
    is_at,
    open_directory,
)
from smolvm_async.state.names import LAYER, TPM
from smolvm_async.state.record import to_json
from smolvm_async.state.snapshot_record import (
    COPIED,
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
TEMPORARY = rf"\.{VM_ID}\.(new|old)-[0-9a-f]{{8}}"
IN_USE = 5.0  # seconds to wait while another process finishes the snapshot, or looks at it
POLL = 0.01  # seconds between two attempts
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)

Check = Callable[[int], object]


class Snapshot:
    """A locked snapshot. The methods read and write files: call them in a thread.

    Attributes:
        path: The path of the directory. It changes if the snapshot is deleted: use `fd`.
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

    def open(self, name: str) -> int:
        """Open a file for reading, if it is unchanged; the caller closes the descriptor.

        A change of `ram`, of a layer, or of a file of more than 16 MiB that keeps size and time is
        not noticed.

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
            if change := facts.change(FileFacts.of(name, fd)):
                raise unusable(self.path, f"{name!r} {change}")
            os.lseek(fd, 0, os.SEEK_SET)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def give(self, directory: VMDirectory) -> None:
        """Link the layers into a VM's directory; copy all other files except `ram` and `machine`.

        Raises:
            SnapshotError: A file is missing or was changed.
            OSError: The VM's directory has such a file already, or its disk is full.
        """
        for name in self.record.files:
            if name not in (RAM, MACHINE):
                _put(self.open(name), name, directory.fd)


class NewSnapshot(Snapshot):
    """A snapshot that is being made. `list_snapshots()` does not show it before `finish()`."""

    def link(self, directory_fd: int, name: str) -> None:
        """Add a layer of a VM's disk as a hard link; nobody may write to the layer any more.

        Between file systems, and where a link is refused, this makes a copy.

        Raises:
            SnapshotError: The layer is missing, or the disk is full.
        """
        with _explained(self.path):
            _put(open_regular(name, directory_fd), name, self.fd)

    def copy(self, directory_fd: int, name: str) -> None:
        """Copy a file of a VM's directory, or if `name` is the TPM's directory, its files.

        Raises:
            SnapshotError: The file is missing, or the disk is full.
        """
        with _explained(self.path):
            for file in [name] if name != TPM else names_in(TPM, directory_fd):
                if file in COPIED or re.search(TPM_FILE, file):
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
        with _explained(self.path):
            for name in (*names_in(".", self.fd), *(() if record.live else names_in(TPM, self.fd))):
                if record.belongs(name):
                    facts[name] = _seal(name, self.fd, durable=durable)
                elif record.live or name != TPM:
                    discard(self.path / name)
        self.record = record.model_copy(update={"files": facts})
        self.record.check(self.path)

    def finish(self, record: SnapshotRecord) -> SnapshotInfo:
        """Complete the snapshot on the disk, give it its name, and release the lock.

        Raises:
            SnapshotExistsError: Another snapshot has got the name meanwhile.
            SnapshotError: A file is missing, or the disk is full.
        """
        self.complete(record, durable=True)
        path = self.path.with_name(self.path.name.split(".")[1])
        with _explained(path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open(RECORD, flags, 0o600, dir_fd=self.fd), "wb") as file:
                file.write(to_json(self.record))
            _seal(RECORD, self.fd, durable=True)
            os.fsync(self.fd)
            info = SnapshotInfo.of(path.name, self.record, self.fd)
            try:
                self.path.rename(path)  # rename(2) never replaces a directory that has files
            except OSError as error:
                raise (_exists(path) if error.errno in TAKEN else error) from None
        self._lease.close()
        with contextlib.suppress(OSError):  # the snapshot exists already
            _sync(path.parent)
        return info

    def close(self) -> None:
        """Remove the directory and release the lock, unless `finish()` has released the lock."""
        try:
            if self.fd >= 0:
                _remove(self.path, self._lease)
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
async def held_snapshot(
    root: Path, name: str, check: Check | None = None
) -> AsyncIterator[HeldSnapshot]:
    """Check the record and all files of a snapshot, and hold the snapshot during the block.

    Args:
        root: The directory that has the snapshots.
        check: Checks an open layer of the disk, and raises a `ValueError` whose message continues a
            sentence that begins with the layer's name.

    Raises:
        SnapshotNotFoundError: No snapshot has this name.
        SnapshotError: The snapshot is damaged, or another user can change it.
    """
    holding = in_background(_hold, root / check_snapshot_name(name), check)
    async with acquired(holding, lambda held: in_background(held.close)) as held:
        yield held


async def list_snapshots(root: Path) -> list[SnapshotInfo]:
    """Return the snapshots in `root`, the oldest first; log a warning for a damaged snapshot."""

    def find() -> list[SnapshotInfo]:
        remove_leftovers(root)
        return [info for _, info in survey_snapshots(root)]

    return sorted(await in_background(find), key=lambda info: -info.age)


async def delete_snapshot(root: Path, name: str) -> None:
    """Delete a snapshot; the files stay while a VM is being made from the snapshot.

    Raises:
        SnapshotNotFoundError: No snapshot has this name.
    """
    await in_background(_delete, root / check_snapshot_name(name))


def survey_snapshots(root: Path) -> Iterator[tuple[SnapshotRecord, SnapshotInfo]]:
    """Yield the record of every snapshot in `root`, and the information about the snapshot."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_use(root, error) from error
    for name in sorted(name for name in names if re.fullmatch(VM_ID, name)):
        path = root / name
        try:
            fd = open_directory(path)
        except OSError as error:
            if error.errno in (*NO_DIRECTORY, errno.EACCES):
                continue  # it was deleted meanwhile, or belongs to another user
            raise cannot_use(path, error) from error
        try:
            record = read_snapshot(path, fd)
            found = (record, SnapshotInfo.of(name, record, fd)) if record is not None else None
        except SnapshotError as error:
            logger.warning("%s", error)
            continue
        except OSError as error:
            raise cannot_use(path, error) from error
        finally:
            os.close(fd)
        if found is not None:
            yield found


def remove_leftovers(root: Path) -> None:
    """Remove the files that killed processes left, and the files of deleted snapshots."""
    try:
        names = os.listdir(root)
    except OSError:
        return  # no snapshot was ever made, or the caller finds the reason
    for path in (root / name for name in names if re.fullmatch(TEMPORARY, name)):
        try:
            lease = Lease(open_directory(path))
            try:
                # Its maker may have renamed the directory meanwhile: then it is a snapshot.
                if try_lock(lease.fd) and is_at(lease.fd, path):
                    _remove(path, lease)
            finally:
                lease.close()
        except FileNotFoundError:
            pass  # another process has removed it meanwhile
        except OSError as error:
            logger.warning("%s", cannot_use(path, error))


def _make(path: Path) -> NewSnapshot:
    root = path.parent
    with _explained(path):
        remove_leftovers(root)
        while True:
            make_private(root)
            check_data_dir(root)
            if os.path.lexists(path):
                raise _exists(path)
            new = root / f".{path.name}.new-{os.urandom(4).hex()}"
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                new.mkdir(mode=0o700)
                if lease := _lock(new, shared=False):
                    return NewSnapshot(new, lease)


def _hold(path: Path, check: Check | None) -> HeldSnapshot:
    with _explained(path):
        held = HeldSnapshot(path, _share(path))
        try:
            _check_owner(path, held.fd)
            record = read_snapshot(path, held.fd)
            if record is None:
                raise _not_found(path)
            held.record = record
            for name in record.files:
                fd = held.open(name)
                try:
                    if check is not None and re.search(LAYER, name):
                        check(fd)
                except ValueError as error:
                    raise unusable(path, f"{name!r} {error}") from error
                finally:
                    os.close(fd)
        except BaseException:
            held.close()
            raise
    return held


def _share(path: Path) -> Lease:
    """Lock a snapshot for use. Its maker, or `remove_leftovers()`, may lock it for a moment."""
    deadline = time.monotonic() + IN_USE
    while True:
        try:
            if lease := _lock(path, shared=True):
                return lease
        except OSError as error:
            raise (_not_found(path) if error.errno in NO_DIRECTORY else error) from None
        if time.monotonic() > deadline:
            raise unusable(path, "another process has locked it", "Try again.")
        time.sleep(POLL)


def _lock(path: Path, *, shared: bool) -> Lease | None:
    """Open and lock a directory; return `None` if it is locked, or was replaced meanwhile."""
    lease = Lease(open_directory(path))
    try:
        if try_lock(lease.fd, shared=shared) and is_at(lease.fd, path):
            return lease
    except OSError:
        lease.close()
        raise
    lease.close()
    return None


def _delete(path: Path) -> None:
    with _explained(path):
        try:
            fd = open_directory(path)
            try:
                os.stat(RECORD, dir_fd=fd, follow_symlinks=False)  # keep a directory of the user's
            finally:
                os.close(fd)
            path.rename(path.with_name(f".{path.name}.old-{os.urandom(4).hex()}"))
        except OSError as error:
            raise (_not_found(path) if error.errno in NO_DIRECTORY else error) from None
        remove_leftovers(path.parent)


def _remove(path: Path, lease: Lease) -> None:
    """Remove a locked directory, and the directory that has the snapshots if it is empty now."""
    with lease.spare_descriptor():
        empty(path)
    path.rmdir()
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def _put(source: int, name: str, dir_fd: int) -> None:
    """Link the open layer `source`, or copy another file, to a directory; close the file."""
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


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_owner(path: Path, fd: int) -> None:
    status = os.fstat(fd)
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        cure = f"Make it your own: chown -R {os.geteuid()} and chmod -R go-rwx."
        raise unusable(path, "another user can change it", cure)


def _exists(path: Path) -> SnapshotExistsError:
    return SnapshotExistsError(
        f"name={path.name!r} is taken: {str(path)!r} exists. Choose another name, or delete the "
        "snapshot with AsyncSmolVM.delete_snapshot()."
    )


def _not_found(path: Path) -> SnapshotNotFoundError:
    return SnapshotNotFoundError(
        f"no snapshot with name={path.name!r} exists in {str(path.parent)!r}: "
        "AsyncSmolVM.snapshots() shows the snapshots; pass data_dir= if they have another one."
    )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `SnapshotError`."""
    try:
        yield
    except OSError as error:
        reason = cannot_use(path, error)
        raise SnapshotError(reason.message, hint=reason.hint) from error
