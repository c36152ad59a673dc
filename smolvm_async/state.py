"""A VM's own directory: held under a lock, filled, cleared, removed.

The lock is an flock(2) on the directory itself, so there is no lock file to leave behind: the
owner's death releases it, and whoever gets it next ends what the dead one left. The record is
the first file to be written and the last to be removed, so that nothing is there without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import time
import weakref
from pathlib import Path

from smolvm_async.errors import ConfigError, VMAlreadyExistsError, VMNotFoundError
from smolvm_async.images import qcow2
from smolvm_async.locking import try_lock
from smolvm_async.orphans import end_orphans
from smolvm_async.process import identify
from smolvm_async.record import NEW_RECORD, RECORD, Record, read_record, write_record
from smolvm_async.shielding import in_thread

# All names that there are in a VM's directory.
OVERLAY, VARS, TPM = "overlay.qcow2", "vars.fd", "tpm"
QEMU_LOG, SWTPM_LOG, CONTROL = "qemu.log", "swtpm.log", "control.sock"
SCRATCH = "scratch"  # marks the directory of something that is no VM, and not worth keeping
OURS = frozenset({RECORD, NEW_RECORD, OVERLAY, VARS, TPM, QEMU_LOG, SWTPM_LOG, CONTROL})

BUSY = 10.0  # seconds that list(), prune() or a start that fails may hold the lock
POLL = 0.01  # seconds between two tries to lock


_held: weakref.WeakSet[StateDirectory] = weakref.WeakSet()


def _release_in_child() -> None:
    """A forked child has the lock too, and must not keep it when the owner dies."""
    for state in list(_held):
        state.release()


os.register_at_fork(after_in_child=_release_in_child)


class StateDirectory:
    """The directory of one VM, 0700, its files 0600; it is ours from `hold()` to `release()`.

    Attributes:
        path: Where it is. The VM's processes have it as their working directory, so that no
            path of the user's becomes part of one of their options.
        fd: The open directory, which is locked; -1 while it is not held.
        record: What it says of itself; `None` if nothing.
    """

    def __init__(self, data_dir: Path, vm_id: str) -> None:
        self.path = data_dir / vm_id
        self.fd = -1
        self.record: Record | None = None

    async def hold(self, *, create: bool) -> None:
        """Lock the directory, made if need be, and end what a dead owner left running in it.

        Raises:
            VMAlreadyExistsError: If a living process, this one included, holds it.
            VMNotFoundError: If it is not there, and not to be made.
            ConfigError: If it cannot be used, or something else has that name.
        """
        deadline = time.monotonic() + BUSY
        try:
            while not await in_thread(self.try_hold, create):
                self._refuse_if_owned(hurry=time.monotonic() > deadline)
                await asyncio.sleep(POLL)
            await self.end_orphans()
        except BaseException:
            self.abandon()
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
                self.fd = open_directory(self.path)
            except FileNotFoundError:
                if create:
                    continue  # its last owner has just removed it
                raise not_found(self.path) from None
            except OSError as error:
                raise ConfigError(
                    f"{str(self.path)!r} cannot be used: {error.strerror}."
                ) from error
            if not _is_at(self.fd, self.path):
                self.release()
                continue
            _held.add(self)
            self._unless_released = weakref.finalize(self, _abandon, self.path, self.fd)
            locked = try_lock(self.fd)
            if locked and not _is_at(self.fd, self.path):
                self.release()
                continue
            self._check_ours()
            self.record = read_record(self.path, self.fd)
            if not locked:
                self.release()
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
        write_record(record, self.fd)
        self.record = record

    async def prepare(self, virtual_size: int, vars_template: Path) -> None:
        """Write the empty overlay, the copy of the UEFI variables and the TPM's directory.

        Raises:
            OSError: If the disk is full or the template cannot be read.
        """
        await asyncio.gather(
            in_thread(self._write, OVERLAY, qcow2.empty(virtual_size)),
            in_thread(lambda: self._write(VARS, vars_template.read_bytes())),
            in_thread((self.path / TPM).mkdir, 0o700),
        )

    def check_kept(self) -> None:
        """Whether the disk, the UEFI variables and the TPM's state of a kept VM are all there.

        Raises:
            ConfigError: If one is not, or is a symbolic link.
        """
        for name, is_kind in ((OVERLAY, stat.S_ISREG), (VARS, stat.S_ISREG), (TPM, stat.S_ISDIR)):
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
        """Remove the TPM's state and the UEFI variables."""
        shutil.rmtree(self.path / TPM, ignore_errors=True)
        (self.path / VARS).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything in the directory but what says whose it is."""
        _clear(self.path)

    def remove(self) -> None:
        """Remove the directory and give the lock back; a second call does nothing."""
        if self.fd >= 0:
            try:
                _remove(self.path)
            finally:
                self.release()

    def abandon(self) -> None:
        """Give the lock back, and remove a directory in which no VM has begun."""
        if self.fd >= 0:
            names = os.listdir(self.path)
            if SCRATCH in names or {NEW_RECORD}.issuperset(names):
                self.remove()
        self.release()

    def mark_scratch(self) -> None:
        """Say that it holds no VM: whoever finds it without a holder may remove it."""
        self._write(SCRATCH, b"")

    def release(self) -> None:
        """Give the lock back and leave the files; a second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            _held.discard(self)
            self._unless_released.detach()
            os.close(fd)

    def _write(self, name: str, content: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(self.path / name, flags, 0o600), "wb") as file:
            file.write(content)

    def _check_ours(self) -> None:
        names = os.listdir(self.path)
        if SCRATCH not in names and not OURS.issuperset(names):
            self.release()
            raise ConfigError(
                f"{str(self.path)!r} exists and is not a VM's directory: "
                f"choose another vm_id= than {self.path.name!r}, or another data_dir=."
            )

    def _refuse_if_owned(self, *, hurry: bool) -> None:
        """Refuse if the one who has the lock is a VM's owner, not someone who just looks."""
        owner = self.record.owner if self.record else None
        if hurry or (owner is not None and identify(owner.pid) == owner):
            by = f"process {owner.pid}" if owner else "another process"
            raise VMAlreadyExistsError(
                f"vm_id={self.path.name!r} is taken by a VM that is in use by {by}: choose another "
                "id, attach to that VM with AsyncSmolVM.from_id(), or delete() it first."
            )


def _abandon(path: Path, fd: int) -> None:
    """What is left to do for an owner that exits, or drops the VM, without ending its loop.

    A Jupyter kernel does so. A kept VM is then an orphan, which its next start() puts right.
    """
    try:
        record = read_record(path, fd)
        if record is not None and not record.config.keep:
            for identity in record.processes.values():
                if identify(identity.pid) == identity:
                    os.kill(identity.pid, signal.SIGKILL)
            _remove(path)
    except (ConfigError, OSError):
        pass  # it is an orphan
    finally:
        os.close(fd)


def _clear(path: Path) -> None:
    """Remove everything in the directory but what says whose it is."""
    for entry in os.scandir(path):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name not in (RECORD, SCRATCH):
            os.unlink(entry.path)


def _remove(path: Path) -> None:
    _clear(path)
    for name in (RECORD, SCRATCH):
        (path / name).unlink(missing_ok=True)
    path.rmdir()


def check_data_dir(data_dir: Path) -> None:
    """Whether VMs can have their directories in `data_dir`, or it can be made; nothing is.

    Raises:
        ConfigError: If it cannot, or other users of this machine could interfere.
    """
    existing = next(path for path in (data_dir, *data_dir.parents) if path.exists())
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


def open_directory(path: Path) -> int:
    """Open a VM's directory; the caller closes it.

    Raises:
        OSError: If it is not there, is no directory or is a symbolic link.
    """
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


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
