"""A VM's own directory: held under a lock, filled, cleared, removed.

The lock is an flock(2) on the directory itself, so there is no lock file to leave behind: the
owner's death releases it, and whoever gets it next ends what the dead one left. The record is
the first file to be written and the last to be removed, so that nothing is there without it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import weakref
from collections.abc import Container, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from smolvm_async.errors import ConfigError, VMAlreadyExistsError, VMNotFoundError
from smolvm_async.foundation.locking import poll, try_lock
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.guests import BUILT_IN, GUESTS
from smolvm_async.state.lease import Lease
from smolvm_async.state.orphans import end_orphans, killed_orphan
from smolvm_async.state.record import NEW_RECORD, RECORD, Record, read_record, write_record

# All names that there are in a VM's directory.
OVERLAY, VARS, TPM = "overlay.qcow2", "vars.fd", "tpm"
QEMU_LOG, CONTROL = "qemu.log", "control.sock"
VNC = "vnc.sock"
SEED = "seed.iso"  # what cloud-init reads
SSH_KEY, HOST_KEY, AUTHORIZED_KEYS = "ssh_key", "ssh_host_ed25519_key", "authorized_keys"
SECRETS = (VARS, SSH_KEY, HOST_KEY, AUTHORIZED_KEYS, SEED)
SCRATCH = "scratch"  # marks the directory of something that is no VM, and not worth keeping
OURS = frozenset({RECORD, NEW_RECORD, OVERLAY, TPM, QEMU_LOG, CONTROL, VNC, *SECRETS})
# The processes that may run beside QEMU. Each is described in a room that this one must not import,
# so its files follow from its name: they are `NAME` or begin with `NAME.`, as its log does. The
# TPM's state has a name of its own: as the UEFI variables, it is the machine's, not a process's.
SIDECARS = frozenset(
    name for guest in (*GUESTS.values(), *BUILT_IN.values()) for name in guest.sidecars
)

NO_DIRECTORY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # nothing there, a file, a link
BUSY = 10.0  # seconds that list(), prune() or a start that fails may hold the lock


def log_name(process: str) -> str:
    """Return the name of the log of `qemu` or of a sidecar."""
    return f"{process}.log"


class Parts(NamedTuple):
    """What a VM's directory holds besides the overlay of its disk.

    Attributes:
        vars_template: What its UEFI variables are copied from; `None` if it has none.
        directories: The directories in which its sidecars keep their state.
        files: Others, by name.
    """

    vars_template: Path | None = None
    directories: tuple[str, ...] = ()
    files: Mapping[str, bytes] = MappingProxyType({})

    @property
    def names(self) -> list[str]:
        """What they are called."""
        return [
            *([VARS] if self.vars_template is not None else []),
            *self.directories,
            *self.files,
        ]


class VMDirectory:
    """The directory of one VM, 0700, its files 0600; it is ours from `hold()` to `release()`.

    Attributes:
        path: Where it is. The VM's processes have it as their working directory, so that no
            path of the user's becomes part of one of their options.
        record: What it says of itself; `None` if nothing.
    """

    def __init__(self, data_dir: Path, vm_id: str) -> None:
        self.path = data_dir / vm_id
        self.record: Record | None = None
        self._lease: Lease | None = None
        self._unless_released: weakref.finalize[..., VMDirectory] | None = None

    @property
    def fd(self) -> int:
        """The open directory, which is locked; -1 while it is not held."""
        return self._lease.fd if self._lease is not None else -1

    @property
    def owner_is_dead(self) -> bool:
        """Whether the record names an owner, and this process no longer runs."""
        owner = self.record.owner if self.record else None
        return owner is not None and not owner.alive

    async def hold(self, *, create: bool) -> None:
        """Lock the directory, made if need be, and end what a dead owner left running in it.

        Raises:
            VMAlreadyExistsError: If a living process, this one included, holds it.
            VMNotFoundError: If it is not there, and not to be made.
            ConfigError: If it cannot be used, or something else has that name.
        """

        def attempt() -> bool:
            if not self.try_hold(create):
                owner = self.record.owner if self.record else None
                if owner is not None and owner.alive:
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
        """Lock the directory and read its record; false if somebody else has locked it.

        Raises:
            VMNotFoundError, ConfigError: See `hold()`.
        """
        if create:
            _make(self.path.parent)
        while True:
            try:
                if create:
                    self.path.mkdir(mode=0o700, exist_ok=True)
                lease = Lease(open_directory(self.path))
            except FileNotFoundError:
                if create:
                    continue  # its last owner has just removed it
                raise not_found(self.path) from None
            except OSError as error:
                if create:
                    with contextlib.suppress(OSError):
                        self.path.rmdir()  # it is empty if we have just made it
                raise cannot_use(self.path, error) from error
            locked = try_lock(lease.fd)
            if not _is_at(lease.fd, self.path):
                lease.close()
                continue
            if locked:
                self._lease = lease
                self._unless_released = weakref.finalize(self, _abandon, self.path, lease)
            try:
                self._check_ours(lease.fd)
                self.record = read_record(self.path, lease.fd)
            finally:
                if not locked:
                    lease.close()
            return locked

    async def end_orphans(self) -> None:
        """End the processes that a dead owner left running in it.

        Raises:
            TimeoutError: If one does not end.
        """
        if self.record is not None:
            await end_orphans(self.record.processes.values(), self.fd)

    def write(self, record: Record) -> None:
        """Replace the record.

        Raises:
            OSError: If the disk is full.
        """
        with self._spare_descriptor():
            write_record(record, self.fd)
        self.record = record

    async def prepare(self, overlay: bytes, parts: Parts) -> None:
        """Write the VM's disk, `overlay`, and the other parts.

        Raises:
            OSError: If the disk is full or a template cannot be read.
        """
        files = {OVERLAY: overlay, **parts.files}
        await in_thread(self._fill, files, parts)

    def check_kept(self, parts: Parts) -> None:
        """Whether these parts of a kept VM, and its disk, are all there.

        Raises:
            ConfigError: If one is not, or is a symbolic link.
        """
        for name in (OVERLAY, *parts.names):
            is_kind = stat.S_ISDIR if name in parts.directories else stat.S_ISREG
            try:
                good = is_kind((self.path / name).lstat().st_mode)
            except FileNotFoundError:
                good = False
            if not good:
                raise ConfigError(
                    f"{str(self.path / name)!r} is missing, or is not what was kept: this VM "
                    "cannot be started again. Put it back, or delete() the VM."
                )

    def clear_secrets(self) -> None:
        """Remove the state of the TPM and of sidecars, the UEFI variables and the SSH keys."""
        for name in SECRETS:
            (self.path / name).unlink(missing_ok=True)
        with self._spare_descriptor():
            for name in (TPM, *SIDECARS):
                with contextlib.suppress(FileNotFoundError):
                    _empty(self.path / name)
                    (self.path / name).rmdir()

    def clear(self) -> None:
        """Remove everything in the directory but what says whose it is."""
        with self._spare_descriptor():
            _empty(self.path, keep=(RECORD, SCRATCH))

    def remove(self) -> None:
        """Remove the directory and give the lock back; a second call does nothing."""
        if self._lease is not None:
            try:
                _remove(self.path, self._lease)
            finally:
                self.release()

    def abandon(self) -> None:
        """Give the lock back, and remove a directory in which no VM has begun."""
        try:
            if self.fd >= 0:
                with self._spare_descriptor():
                    names = os.listdir(self.path)
                if SCRATCH in names or {NEW_RECORD}.issuperset(names):
                    self.remove()
        finally:
            self.release()

    def mark_scratch(self) -> None:
        """Say that it holds no VM: whoever finds it without a holder may remove it."""
        self._write(SCRATCH, b"")

    def remove_sockets(self) -> None:
        """Remove what a run was to be reached by."""
        for name in (CONTROL, VNC):
            (self.path / name).unlink(missing_ok=True)

    def release(self) -> None:
        """Give the lock back and leave the files; a second call does nothing."""
        if self._lease is not None and self._unless_released is not None:
            self._unless_released.detach()
            self._lease.close()
            self._lease = None

    def _spare_descriptor(self) -> AbstractContextManager[None]:
        assert self._lease is not None, "it is held"
        return self._lease.spare_descriptor()

    def _write(self, name: str, content: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(self.path / name, flags, 0o600), "wb") as file:
            file.write(content)

    def _fill(self, files: Mapping[str, bytes], parts: Parts) -> None:
        for name, content in files.items():
            self._write(name, content)
        if parts.vars_template is not None:
            self._write(VARS, parts.vars_template.read_bytes())
        for name in parts.directories:
            (self.path / name).mkdir(0o700)

    def _check_ours(self, fd: int) -> None:
        names = os.listdir(fd)  # not by its path: whoever has the lock may be removing it
        others = {name for name in names if name.partition(".")[0] not in SIDECARS}
        if SCRATCH not in names and not OURS.issuperset(others):
            raise ConfigError(
                f"{str(self.path)!r} exists and is not a VM's directory: "
                f"choose another vm_id= than {self.path.name!r}, or another data_dir=."
            )

    def _in_use(self, by: str) -> VMAlreadyExistsError:
        return VMAlreadyExistsError(
            f"vm_id={self.path.name!r} is taken by a VM that is in use by {by}: choose another "
            "id, attach to that VM with AsyncSmolVM.from_id(), or delete() it first."
        )


def _abandon(path: Path, lease: Lease) -> None:
    """What is left to do for an owner that exits, or drops the VM, without ending its loop.

    A Jupyter kernel does so. A kept VM is then an orphan, which its next start() puts right.
    """
    try:
        record = read_record(path, lease.fd)
        if record is not None and not record.config.keep:
            for identity in record.processes.values():
                with killed_orphan(identity, lease.fd):
                    pass  # nobody is left to wait for it
            _remove(path, lease)
    except (ConfigError, OSError):
        pass  # it is an orphan
    finally:
        lease.close()


def _remove(path: Path, lease: Lease) -> None:
    with lease.spare_descriptor():
        _empty(path, keep=(RECORD, SCRATCH))
    for name in (RECORD, SCRATCH):
        (path / name).unlink(missing_ok=True)
    path.rmdir()


def _empty(directory: str | Path, keep: Container[str] = ()) -> None:
    """Remove what is in a directory; one descriptor is enough, where `shutil` would take two."""
    with os.scandir(directory) as entries:
        found = list(entries)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            _empty(entry.path)
            os.rmdir(entry.path)
        elif entry.name not in keep:
            os.unlink(entry.path)


def check_data_dir(data_dir: Path) -> None:
    """Whether VMs can have their directories in `data_dir`, or it can be made; nothing is.

    Raises:
        ConfigError: If it cannot, or other users of this machine could interfere.
    """
    try:
        existing = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    except OSError as error:
        raise _unusable(data_dir, str(error.strerror)) from error
    if not existing.is_dir():
        raise _unusable(data_dir, f"{str(existing)!r} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unusable(data_dir, f"this user may not write to {str(existing)!r}")
    if existing != data_dir:
        return
    status = data_dir.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise _unusable(data_dir, f"it belongs to another user (user id {status.st_uid})")
    if status.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        raise ConfigError(
            f"data_dir={str(data_dir)!r} can be written to by other users of this machine: "
            f"pass another one, or run: chmod go-w {str(data_dir)!r}"
        )


def _make(data_dir: Path) -> None:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(data_dir, str(error.strerror)) from error
    check_data_dir(data_dir)


def _unusable(data_dir: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"data_dir={str(data_dir)!r} cannot be used: {reason}; pass the path of a directory that "
        "this user can write to."
    )


def find_directory(path: Path) -> int:
    """Open a VM's directory, which has to be there; the caller closes it.

    Raises:
        VMNotFoundError: If it is not.
        ConfigError: If it cannot be opened now.
    """
    try:
        return open_directory(path)
    except OSError as error:
        if error.errno in NO_DIRECTORY:
            raise not_found(path) from None
        raise cannot_use(path, error) from error


def open_directory(path: Path) -> int:
    """Open a VM's directory; the caller closes it.

    Raises:
        OSError: If it is not there, is no directory or is a symbolic link.
    """
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def cannot_use(path: Path, error: OSError) -> ConfigError:
    """What to raise if the operating system refuses a directory."""
    return ConfigError(f"{str(path)!r} cannot be used: {error.strerror or error}.")


def not_found(path: Path) -> VMNotFoundError:
    """What to raise if `path` is no VM's directory."""
    return VMNotFoundError(
        f"vm_id={path.name!r} is not a VM in {str(path.parent)!r}: AsyncSmolVM.list() tells which "
        "there are; pass data_dir= if it was made with one."
    )


def _is_at(fd: int, path: Path) -> bool:
    """Whether `path` still is the directory that was opened: its last owner may have removed it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    return False
