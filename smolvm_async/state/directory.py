"""A VM's directory: lock it, fill it, clear it, remove it.

The record is the first file that is written and the last that is removed, so a directory without a
record never contains a VM.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shlex
import stat
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from smolvm_async.errors import (
    ConfigError,
    SnapshotError,
    VMAlreadyExistsError,
    VMElsewhereError,
    VMNotFoundError,
)
from smolvm_async.foundation.files import make_private, replace_file
from smolvm_async.foundation.fork import private, this_process
from smolvm_async.foundation.locking import poll, try_lock
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.process import own_identity
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.host.identity import Relation, relation, this_host
from smolvm_async.state.claim import claim, unclaim
from smolvm_async.state.names import (
    MARKS,
    NEW_RECORD,
    OVERLAY,
    RECORD,
    SCRATCH,
    SECRETS,
    SOCKETS,
    VARS,
    is_leftover,
    is_ours,
)
from smolvm_async.state.orphans import end_orphans, killed_orphan
from smolvm_async.state.record import Record, read_record

logger = get_logger(__name__)

T = TypeVar("T")

NO_DIRECTORY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # missing, a file, or a link
REMOVED = (errno.ENOENT, errno.ESTALE)  # the directory that was opened was removed since
FULL = (errno.ENOSPC, errno.EDQUOT)
BUSY = 10.0  # seconds to wait while list(), prune() or a failing start holds the lock


class Parts(NamedTuple):
    """The parts of a VM in its directory, besides the overlay of its disk.

    Attributes:
        vars_template: The file to copy the UEFI variables from; `None` for a VM without UEFI.
        directories: The names of the directories in which the VM's sidecars keep their state.
        files: The content of the other files, by name.
    """

    vars_template: Path | None = None
    directories: tuple[str, ...] = ()
    files: Mapping[str, bytes] = MappingProxyType({})

    @property
    def names(self) -> list[str]:
        """The names of all parts."""
        uefi = [VARS] if self.vars_template is not None else []
        return [*uefi, *self.directories, *self.files]


# The lock is an flock(2) on the open directory itself, so no lock file can stay behind, and the
# kernel releases the lock when the owner dies. Five problems have to be solved:
#
# 1. Creating, opening and locking the directory are three calls, and the last owner may remove the
#    directory between two of them. The lock would then be on a deleted directory. So after locking,
#    `try_hold` compares the path with the open directory, and starts again if they differ.
# 2. A locked directory does not mean that the VM is in use: list(), prune() and from_id() lock the
#    directory for a moment. So `hold` reads the record: if the record names a living owner, `hold`
#    fails at once; otherwise, `hold` tries again for BUSY seconds.
# 3. The user may have a directory with the name of the VM. So this library uses and removes a
#    directory only if all names in it are names of this library's files.
# 4. A dead owner's QEMU may run for a moment longer and write to the disk. So `hold` finally calls
#    `end_orphans`.
# 5. If the owner forks, as multiprocessing does, the child has a copy of the descriptor and so of
#    the lock. `foundation/fork.py` takes the copy from the child, or the lock would outlast the
#    owner. In the child, `Lease.fd` is -1, so the child changes no file.
# 6. On a shared file system, the lock may not exclude other hosts. So `try_hold` also claims the
#    directory for this host (see `claim`), and gives up if the record's owner is on another host.


class Lease:
    """The lock on a directory, and a spare descriptor.

    Removing a directory needs a descriptor, and must not fail if the process has none left.

    Attributes:
        fd: The descriptor of the open directory; closing it releases the lock. -1 after `close()`,
            and in a forked child.
        claimed: Whether the directory is claimed for this host, until `release()`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._owner = this_process()
        self.claimed = False
        self._spare = -1
        self._reserve()

    @property
    def fd(self) -> int:
        """See the class."""
        return self._fd if self._owner.is_this else -1

    @contextlib.contextmanager
    def spare_descriptor(self) -> Iterator[None]:
        """Close the spare descriptor during the block, so that the block can open a descriptor."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        try:
            yield
        finally:
            if self.fd >= 0:
                self._reserve()

    def release(self) -> None:
        """Remove the claim and release the lock; a second call does nothing."""
        if self.claimed and self.fd >= 0:
            unclaim(self.fd)
        self.close()

    def close(self) -> None:
        """Close the descriptors, which releases the lock; a second call does nothing."""
        descriptors, self._fd, self._spare = (self._fd, self._spare), -1, -1
        for fd in descriptors:
            if fd >= 0:
                os.close(fd)

    def _reserve(self) -> None:
        with contextlib.suppress(OSError):
            self._spare = private(os.dup(self._fd))


class VMDirectory:
    """The directory (0700) of one VM and its files (0600), locked from `hold()` to `release()`.

    Attributes:
        path: The directory's path. The VM's processes work in this directory, so a path of the
            user's never becomes part of their options.
        record: The record in the directory; `None` if there is no record.
        other_host: The name of the other host that prevented the last `try_hold()`; else `None`.

    Args:
        gone_host: The name of a host that never runs again: take over its VMs.
    """

    def __init__(self, data_dir: Path, vm_id: str, gone_host: str | None = None) -> None:
        self.path = data_dir / vm_id
        self.record: Record | None = None
        self.other_host: str | None = None
        self._gone_host = gone_host
        self._lease: Lease | None = None
        self._unless_released: weakref.finalize[..., VMDirectory] | None = None

    @property
    def fd(self) -> int:
        """The descriptor of the locked directory; -1 while this object does not hold the lock."""
        return self._lease.fd if self._lease is not None else -1

    @property
    def owner_is_dead(self) -> bool:
        """True if the record names an owner process that no longer runs."""
        return self.record is not None and self.record.owner_is_dead

    async def hold(self, *, create: bool) -> None:
        """Lock the directory, and kill the processes that a dead owner left running in it.

        If `create` is true, create the directory if it does not exist.

        Raises:
            VMAlreadyExistsError: If a living process (even this process) already holds the lock.
            VMElsewhereError: If another host uses the directory.
            VMNotFoundError: If the directory does not exist, and `create` is false.
            ConfigError: If the directory cannot be used, or is not a VM's directory.
        """

        def attempt() -> bool:
            if not self.try_hold(create):
                owner = self.record.owner if self.record else None
                if owner is not None and not self.owner_is_dead:
                    raise self._in_use(f"process {owner.pid}")
            return self.fd >= 0

        try:
            if not await poll(attempt, BUSY):
                raise self._in_use("another process")
            await self.end_orphans()
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.abandon()
            if isinstance(error, OSError):
                raise cannot_use(self.path, error) from error
            raise

    def try_hold(self, create: bool) -> bool:
        """Lock and claim the directory, and read its record; return false if it is in use."""
        own_identity()  # a host without /proc fails here, before anything is created
        if create:
            _make(self.path.parent)
        while True:
            try:
                if create:
                    self.path.mkdir(mode=0o700, exist_ok=True)
                lease = Lease(open_directory(self.path))
            except FileNotFoundError:
                if create:
                    continue  # the last owner has just removed it
                raise not_found(self.path) from None
            except OSError as error:
                if create:
                    with contextlib.suppress(OSError):
                        self.path.rmdir()  # fails unless the directory is empty, as after mkdir()
                raise cannot_use(self.path, error) from error
            try:
                locked = try_lock(lease.fd)
            except OSError:
                lease.close()
                if create:
                    with contextlib.suppress(OSError):
                        self.path.rmdir()  # fails unless the directory is empty
                raise
            if not is_at(lease.fd, self.path):
                lease.close()
                continue
            if locked:
                self._lease = lease
                self._unless_released = weakref.finalize(self, _abandon, self.path, lease)
            try:
                self._check_ours(lease.fd)
                self.other_host = None
                locked = locked and self._claim(lease)
                self.record = read_record(self.path, lease.fd)
                locked = self._may_use(lease.fd) and locked
            finally:
                if not locked:
                    self.release()
                    lease.close()
            return locked

    def _claim(self, lease: Lease) -> bool:
        """Claim the directory for this host, and return whether this succeeded.

        On a full disk, the lock must do to remove a VM; no VM can start there.
        """
        try:
            with lease.spare_descriptor():
                holder = claim(lease.fd, self._gone_host)
        except OSError as error:
            if error.errno not in (*REMOVED, *FULL):
                raise
            return error.errno in FULL  # another host may have just removed the directory
        lease.claimed = holder is None
        if holder is not None and relation(holder, this_host()) is not Relation.SAME_PIDS:
            self.other_host = holder.name
        return holder is None

    def _may_use(self, fd: int) -> bool:
        """Return whether no process of this or another host uses the locked directory."""
        record = self.record
        if record is not None and record.is_elsewhere(fd):
            host = record.host.name if record.host is not None else ""
            if host != self._gone_host:
                self.other_host = host
        used = record is not None and record.is_used(fd, held=False)
        return self.other_host is None and not used

    async def end_orphans(self) -> None:
        """Kill the processes that a dead owner left running in the directory."""
        if self.record is not None:
            await end_orphans(self.record.processes_here, self.fd)

    def write(self, record: Record) -> None:
        """Replace the record."""
        with self._spare_descriptor():
            content = record.to_json()
            replace_file(RECORD, content, temporary=NEW_RECORD, mode=0o600, dir_fd=self.fd)
        self.record = record

    def fill(self, disk: bytes, parts: Parts, layer: str = OVERLAY) -> None:
        """Write `disk`, which is the layer of the disk that the VM writes to, and other parts."""
        for name, content in {layer: disk, **parts.files}.items():
            self._write(name, content)
        if parts.vars_template is not None:
            self._write(VARS, parts.vars_template.read_bytes())
        for name in parts.directories:
            (self.path / name).mkdir(0o700)

    async def write_layer(self, layer: str, content: bytes) -> None:
        """Write a new layer of the disk, in place of one that a killed process has left."""

        def write() -> None:
            (self.path / layer).unlink(missing_ok=True)
            self._write(layer, content)

        await in_thread(write)

    def check_kept(self, layers: Iterable[str], parts: Parts) -> None:
        """Check that a kept VM's `layers` and `parts` exist and are not symbolic links."""
        for name in (*layers, *parts.names):
            path = self.path / name
            is_kind = path.is_dir if name in parts.directories else path.is_file
            if path.is_symlink() or not is_kind():
                raise ConfigError(
                    f"{str(path)!r} is missing or was replaced, so this VM cannot start "
                    "again. Restore the original file or directory, or delete() the VM."
                )

    def clear_secrets(self) -> None:
        """Remove the state of the TPM and other sidecars, the UEFI variables and the SSH keys."""
        with self._spare_descriptor():
            for name in SECRETS:
                with contextlib.suppress(FileNotFoundError):
                    discard(self.path / name)

    def clear(self) -> None:
        """Remove everything in the directory except the record."""
        with self._spare_descriptor():
            empty(self.path, keep=MARKS)

    def remove(self) -> None:
        """Remove the directory and release the lock; a second call does nothing."""
        if self._lease is not None and self.fd >= 0:
            try:
                _remove(self.path, self._lease)
            finally:
                self.release()

    def abandon(self) -> None:
        """Release the lock, and remove the directory if it does not contain a VM."""
        try:
            if self.fd >= 0:
                with self._spare_descriptor():
                    names = os.listdir(self.path)
                # Others cannot enter the directories that this library makes: keep a user's.
                private = os.fstat(self.fd).st_mode & 0o077 == 0
                if SCRATCH in names or (private and all(map(is_leftover, names))):
                    self.remove()
        finally:
            self.release()

    def mark_scratch(self) -> None:
        """Mark the directory as unused: any process that can lock the directory may remove it."""
        self._write(SCRATCH, b"")

    def remove_sockets(self) -> None:
        """Remove the sockets of the VM's last run, if this object holds the lock."""
        for name in SOCKETS if self.fd >= 0 else ():
            (self.path / name).unlink(missing_ok=True)

    def release(self) -> None:
        """Release the lock and keep the files; a second call does nothing."""
        if self._lease is not None and self._unless_released is not None:
            self._unless_released.detach()
            self._lease.release()
            self._lease = None

    def _spare_descriptor(self) -> AbstractContextManager[None]:
        assert self._lease is not None, "it is held"
        return self._lease.spare_descriptor()

    def _write(self, name: str, content: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(self.path / name, flags, 0o600), "wb") as file:
            file.write(content)

    def _check_ours(self, fd: int) -> None:
        names = os.listdir(fd)  # not self.path: its owner may be removing it just now
        if SCRATCH not in names and not all(map(is_ours, names)):
            raise ConfigError(
                f"{str(self.path)!r} exists and is not a VM's directory: "
                f"choose a vm_id= other than {self.path.name!r}, or another data_dir=."
            )

    def _in_use(self, by: str) -> VMAlreadyExistsError:
        if self.other_host is not None:
            return elsewhere(self.path, self.other_host)
        return VMAlreadyExistsError(
            f"vm_id={self.path.name!r} belongs to a VM that {by} is using: choose another "
            "id, attach to the VM with AsyncSmolVM.from_id(), or delete() it first."
        )


def _abandon(path: Path, lease: Lease) -> None:
    """Clean up if the owner exits, or drops the VM, without closing its event loop.

    A Jupyter kernel does so. A kept VM then becomes an orphan, which its next start() repairs.
    """
    try:
        record = read_record(path, lease.fd)
        if record is not None and not record.config.keep:
            for identity in record.processes_here:
                with killed_orphan(identity, lease.fd):
                    pass  # there is no loop to wait for the end of the process
            _remove(path, lease)
    except (ConfigError, OSError):
        pass  # the VM stays as an orphan
    finally:
        lease.release()


def _remove(path: Path, lease: Lease) -> None:
    with lease.spare_descriptor():
        empty(path, keep=MARKS)
    lease.claimed = False  # as soon as the claim is removed, another host may claim the directory
    for name in MARKS:
        (path / name).unlink(missing_ok=True)
    path.rmdir()


def empty(directory: Path, keep: Container[str] = ()) -> None:
    """Remove everything in a directory; this needs only one descriptor, `shutil` needs two."""
    for name in os.listdir(directory):
        if name not in keep:
            with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                discard(directory / name)


def discard(path: Path) -> None:
    """Remove a file, or a directory with its content."""
    if stat.S_ISDIR(path.lstat().st_mode):
        empty(path)
        path.rmdir()
    else:
        path.unlink()


def check_data_dir(data_dir: Path) -> None:
    """Check that `data_dir` is usable and only this user can change it; do not create it."""
    try:
        existing = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    except OSError as error:
        raise _unusable(data_dir, str(error.strerror)) from error
    if not existing.is_dir():
        raise _unusable(data_dir, f"{str(existing)!r} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        if os.statvfs(existing).f_flag & os.ST_RDONLY:
            raise cannot_use(data_dir, OSError(errno.EROFS, os.strerror(errno.EROFS)))
        raise _unusable(data_dir, f"this user may not write to {str(existing)!r}")
    if existing != data_dir:
        return
    status = data_dir.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise _unusable(data_dir, f"it belongs to another user (user id {status.st_uid})")
    if status.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        raise ConfigError(
            f"Other users of this machine can write to data_dir={str(data_dir)!r}: "
            f"pass another directory, or run: chmod go-w {str(data_dir)!r}"
        )


def loose_parent(data_dir: Path) -> Path | None:
    """Return a parent in which other users can replace a directory; `None` if there is none.

    Group members do not count as others if the group is this user's own, or root's.
    """
    for parent in data_dir.resolve().parents:
        status = parent.stat()
        own = status.st_gid in (0, os.getegid())
        others = stat.S_IWOTH if own else stat.S_IWOTH | stat.S_IWGRP
        if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
            return parent
    return None


def describe_loose(parent: Path) -> tuple[str, str]:
    """Return the problem of a parent that `loose_parent()` found, and the cure."""
    problem = f"other users can write to {str(parent)!r}, and so replace the data directory in it"
    return problem, f"Run: chmod go-w {shlex.quote(str(parent))}"


@functools.cache  # one warning for each directory, not for each VM
def _warn_if_loose(data_dir: Path) -> None:
    with contextlib.suppress(OSError):  # a parent cannot be entered
        if parent := loose_parent(data_dir):
            logger.warning("%s. %s", *describe_loose(parent))


def _make(data_dir: Path) -> None:
    try:
        make_private(data_dir)
    except OSError as error:
        raise _unusable(data_dir, str(error.strerror)) from error
    check_data_dir(data_dir)
    _warn_if_loose(data_dir)


def _unusable(data_dir: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"data_dir={str(data_dir)!r} cannot be used: {reason}; pass the path of a directory that "
        "this user can write to. Without data_dir=, XDG_STATE_HOME or HOME names the directory."
    )


def find_directory(path: Path) -> int:
    """Open a VM's directory, or raise an error for the user; the caller closes the descriptor."""
    try:
        return open_directory(path)
    except OSError as error:
        if error.errno in NO_DIRECTORY:
            raise not_found(path) from None
        raise cannot_use(path, error) from error


def read_each(paths: Iterable[Path], read: Callable[[Path, int], T | None]) -> Iterator[T]:
    """Yield what `read` returns for each directory, unless it returns `None`.

    Args:
        read: Called with the path and the descriptor of the open directory. If it raises a
            `ConfigError` or a `SnapshotError`, the error is logged as a warning.
    """
    for path in paths:
        try:
            fd = open_directory(path)
        except OSError as error:
            if error.errno in (*NO_DIRECTORY, errno.EACCES):
                continue  # it was removed meanwhile, or belongs to another user
            raise cannot_use(path, error) from error
        try:
            found = read(path, fd)
        except (ConfigError, SnapshotError) as error:
            logger.warning("%s", error)
            continue
        except OSError as error:
            raise cannot_use(path, error) from error
        finally:
            os.close(fd)
        if found is not None:
            yield found


def open_directory(path: Path) -> int:
    """Open a VM's directory, unless it is a symbolic link; the caller closes the descriptor."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def cannot_use(path: Path, error: OSError) -> ConfigError:
    """Return the exception for a directory that the operating system cannot use."""
    from smolvm_async.host.restrictions import find_cause  # rarely needed

    reason, hint = str(error.strerror or error), ""
    if (cause := find_cause(str(error), path)) is not None:
        reason, hint = f"{reason}; {cause.reason}", cause.cure
    return ConfigError(f"{str(path)!r} cannot be used: {reason}.", hint=hint)


def not_found(path: Path) -> VMNotFoundError:
    """Return the exception for a path that is not a VM's directory."""
    return VMNotFoundError(
        f"no VM with vm_id={path.name!r} exists in {str(path.parent)!r}: AsyncSmolVM.list() shows "
        "the VMs; pass data_dir= if the VM was created with data_dir=."
    )


def elsewhere(path: Path, host: str) -> VMElsewhereError:
    """Return the exception for a VM that another host uses."""
    words = ("smolvm-async", "prune", "--gone-host", host, "--data-dir", str(path.parent))
    return VMElsewhereError(
        f"The VM {path.name!r} in {str(path.parent)!r} belongs to host {host!r}: only that host "
        "can start, attach to, stop or delete the VM.",
        hint=f"Do this on {host!r}. If that host, or that container, never runs again, take over "
        f"its VMs with AsyncSmolVM.prune(gone_host={host!r}), or: {shlex.join(words)}",
        host=host,
    )


def is_at(fd: int, path: Path) -> bool:
    """Return whether `path` still leads to the directory that was opened as `fd`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    return False
