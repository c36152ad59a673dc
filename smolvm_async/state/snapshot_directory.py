"""The directories of snapshots: their names and locks, and their removal.

A directory with the name of a snapshot is always whole: it has a temporary name while it is made,
and again before its files are removed. A process locks the directory while it makes, uses or
removes it, so any process may remove a directory that has a temporary name and is not locked. Users
share the lock, and find the files by the open directory. If the snapshot is deleted meanwhile, the
last user removes the files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from smolvm_async.config.checks import VM_ID
from smolvm_async.errors import (
    ConfigError,
    SnapshotError,
    SnapshotExistsError,
    SnapshotNotFoundError,
)
from smolvm_async.foundation.files import make_private
from smolvm_async.foundation.locking import try_lock
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.process import Identity, own_identity
from smolvm_async.host.identity import this_host
from smolvm_async.state.directory import (
    NO_DIRECTORY,
    Lease,
    cannot_use,
    check_data_dir,
    empty,
    is_at,
    open_directory,
)
from smolvm_async.state.snapshot_record import is_snapshot, unusable

logger = get_logger(__name__)

TEMPORARY = rf"\.{VM_ID}\.(new|old)-[0-9a-f]{{8}}"
# The snapshot of a fork that only one process uses: the key of its host, and its identity.
FORK = r"fork-([0-9a-f]{8})-([0-9]{1,10})-([0-9]{1,19})-[0-9a-f]{8}"
IN_USE = 5.0  # seconds to wait while another process finishes the snapshot, or looks at it
POLL = 0.01  # seconds between two attempts
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def make_directory(path: Path) -> tuple[Path, Lease]:
    """Make and lock the directory of a new snapshot; return its temporary path.

    Raises:
        SnapshotExistsError: `path` exists.
        ConfigError: Other users can write to the parent.
    """
    remove_leftovers(path.parent)
    if os.path.lexists(path):
        raise _exists(path)
    while True:
        new = _temporary(path, "new")
        try:
            make_private(path.parent)
            new.mkdir(mode=0o700)
            lease = _lock(new, shared=False)
        except (FileNotFoundError, FileExistsError):
            _check_removed(path.parent)
            continue
        if lease is not None:
            break
    try:
        check_data_dir(path.parent)  # no other process removes it now
    except (ConfigError, OSError):
        with contextlib.suppress(OSError):
            remove_directory(new, lease)
        lease.close()
        raise
    return new, lease


def _check_removed(root: Path) -> None:
    """Check that another process has just removed `root`, or a directory in it: try again then."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(root.lstat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def name_directory(new: Path, lease: Lease) -> None:
    """Give a finished directory the snapshot's name, and release the lock.

    Raises:
        SnapshotExistsError: Another snapshot has got the name meanwhile.
    """
    path = final_path(new)
    try:
        new.rename(path)  # rename(2) never replaces a directory that has files
    except OSError as error:
        raise (_exists(path) if error.errno in TAKEN else error) from None
    lease.close()
    with contextlib.suppress(OSError):  # the snapshot exists already
        root = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(root)
        finally:
            os.close(root)


def final_path(new: Path) -> Path:
    """Return the path that a directory with a temporary name will get."""
    return new.with_name(new.name.split(".")[1])


def share_directory(path: Path) -> Lease:
    """Lock a snapshot for use; its maker, or `remove_leftovers()`, may lock it for a moment.

    Raises:
        SnapshotNotFoundError: `path` is not a directory.
        SnapshotError: Another user can change the directory, or it stays locked.
    """
    deadline = time.monotonic() + IN_USE
    while True:
        try:
            lease = _lock(path, shared=True)
        except OSError as error:
            raise (not_found(path) if error.errno in NO_DIRECTORY else error) from None
        if lease is not None:
            break
        if time.monotonic() > deadline:
            raise unusable(path, "another process has locked it", "Try again.")
        time.sleep(POLL)
    status = os.fstat(lease.fd)
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        lease.close()
        cure = f"Make it your own: chown -R {os.geteuid()} and chmod -R go-rwx."
        raise unusable(path, "another user can change it", cure)
    return lease


def delete_directory(path: Path) -> None:
    """Take a snapshot's name away, and remove the directory if no process uses it.

    Raises:
        SnapshotNotFoundError: `path` is not the directory of a snapshot.
    """
    with explained(path):
        try:
            fd = open_directory(path)
            try:
                if not is_snapshot(fd):  # keep a directory of the user's
                    raise not_found(path)
            finally:
                os.close(fd)
            _unname(path)
        except OSError as error:
            raise (not_found(path) if error.errno in NO_DIRECTORY else error) from None
        remove_leftovers(path.parent)


def remove_leftovers(root: Path) -> None:
    """Remove the directories that killed processes left, and deleted ones that are not in use."""
    try:
        names = os.listdir(root)
    except OSError:
        return  # no snapshot was ever made, or the caller finds the reason
    for path in map(root.joinpath, names):
        try:
            if is_of_fork(path.name, ended=True):
                path = _unname(path)
            elif not re.fullmatch(TEMPORARY, path.name):
                continue
            # Its maker may have renamed the directory meanwhile: then `_lock()` returns `None`.
            if lease := _lock(path, shared=False):
                try:
                    remove_directory(path, lease)
                finally:
                    lease.close()
        except FileNotFoundError:
            pass  # another process has removed it meanwhile
        except OSError as error:
            logger.warning("%s", cannot_use(path, error))


def fork_name(root: Path) -> str:
    """Return a name for a fork's snapshot in `root`, which goes after this process has ended."""
    with explained(root):
        pid, started = own_identity()
    return f"fork-{this_host().key}-{pid}-{started}-{os.urandom(4).hex()}"


def is_of_fork(name: str, *, ended: bool = False) -> bool:
    """Return whether a name is from `fork_name()`; with `ended`, only if that process has ended."""
    found = re.fullmatch(FORK, name)
    if found is None or not ended:
        return found is not None
    return found[1] == this_host().key and not Identity(int(found[2]), int(found[3])).alive


def _unname(path: Path) -> Path:
    """Take a snapshot's name away, and return the new path."""
    old = _temporary(path, "old")
    path.rename(old)
    return old


def remove_directory(path: Path, lease: Lease) -> None:
    """Remove a locked directory, and its parent if the parent is empty now."""
    with lease.spare_descriptor():
        empty(path)
    path.rmdir()
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def _lock(path: Path, *, shared: bool) -> Lease | None:
    """Open and lock a directory; return `None` if it is locked, or was renamed meanwhile."""
    lease = Lease(open_directory(path))
    try:
        if try_lock(lease.fd, shared=shared) and is_at(lease.fd, path):
            return lease
    except OSError:
        lease.close()
        raise
    lease.close()
    return None


def _temporary(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.urandom(4).hex()}")


def _exists(path: Path) -> SnapshotExistsError:
    return SnapshotExistsError(
        f"name={path.name!r} is taken: {str(path)!r} exists. Choose another name, or delete the "
        "snapshot with AsyncSmolVM.delete_snapshot()."
    )


def not_found(path: Path) -> SnapshotNotFoundError:
    """Return the exception for a path that is not a snapshot's directory."""
    return SnapshotNotFoundError(
        f"no snapshot with name={path.name!r} exists in {str(path.parent)!r}: "
        "AsyncSmolVM.snapshots() shows the snapshots; pass data_dir= if they have another one."
    )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `SnapshotError`."""
    try:
        yield
    except OSError as error:
        reason = cannot_use(path, error)
        raise SnapshotError(reason.message, hint=reason.hint) from error
