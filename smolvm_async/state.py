"""A VM's own directory: taken under a lock, filled, cleared, removed.

The lock is an flock(2) on the directory itself, so there is no lock file to leave behind: the
owner's death releases it, and whoever gets it next clears what the dead one left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
from pathlib import Path

from smolvm_async.errors import ConfigError, VMAlreadyExistsError
from smolvm_async.images import qcow2
from smolvm_async.locking import try_lock
from smolvm_async.shielding import in_thread

# All names that there are in a VM's directory.
OVERLAY, VARS, TPM = "overlay.qcow2", "vars.fd", "tpm"
QEMU_LOG, SWTPM_LOG = "qemu.log", "swtpm.log"
OURS = frozenset({OVERLAY, VARS, TPM, QEMU_LOG, SWTPM_LOG})


class StateDirectory:
    """The directory of one VM, 0700, its files 0600; it is ours for as long as it is open.

    Attributes:
        path: Where it is. The VM's processes have it as their working directory, so that no
            path of the user's becomes part of one of their options.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def take(cls, data_dir: Path, vm_id: str) -> StateDirectory:
        """Make the directory of `vm_id` and lock it; clear what a dead owner left in it.

        Raises:
            VMAlreadyExistsError: If a living process, this one included, holds it.
            ConfigError: If `data_dir` cannot be used, or has something else of that name.
        """
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(data_dir, str(error.strerror)) from error
        check_data_dir(data_dir)
        path = data_dir / vm_id
        while True:
            try:
                path.mkdir(mode=0o700, exist_ok=True)
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # its last owner has just removed it
            except OSError as error:
                raise ConfigError(f"{str(path)!r} cannot be used: {error.strerror}.") from error
            if not try_lock(fd):
                os.close(fd)
                raise VMAlreadyExistsError(
                    f"vm_id={vm_id!r} is taken by a VM that is in use: choose another id, "
                    "or delete() that VM first."
                )
            if not _is_at(fd, path):
                os.close(fd)
                continue
            if not OURS.issuperset(os.listdir(path)):
                os.close(fd)
                raise ConfigError(
                    f"{str(path)!r} exists and is not a VM's directory: "
                    f"choose another vm_id= than {vm_id!r}, or another data_dir=."
                )
            directory = cls(path, fd)
            directory.clear()
            return directory

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

    def clear_secrets(self) -> None:
        """Remove the TPM's state and the UEFI variables."""
        shutil.rmtree(self.path / TPM, ignore_errors=True)
        (self.path / VARS).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything in the directory."""
        for entry in os.scandir(self.path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def remove(self) -> None:
        """Remove the directory and give the lock back; a second call does nothing."""
        if self._fd >= 0:
            try:
                shutil.rmtree(self.path)
            finally:
                os.close(self._fd)
                self._fd = -1

    def _write(self, name: str, content: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(self.path / name, flags, 0o600), "wb") as file:
            file.write(content)


def check_data_dir(data_dir: Path) -> None:
    """Whether VMs can have their directories in `data_dir`, or it can be made; nothing is.

    Raises:
        ConfigError: If it cannot, or every user of this machine could interfere.
    """
    existing = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    if not existing.is_dir():
        raise _unusable(data_dir, f"{str(existing)!r} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unusable(data_dir, f"this user may not write to {str(existing)!r}")
    if existing == data_dir and data_dir.stat().st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"data_dir={str(data_dir)!r} can be written to by every user of this machine: "
            "pass another one, or run chmod o-w on it."
        )


def _unusable(data_dir: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"data_dir={str(data_dir)!r} cannot be used: {reason}; pass the path of a directory that "
        "this user can write to."
    )


def _is_at(fd: int, path: Path) -> bool:
    """Whether `path` still is the directory that was opened: its last owner may have removed it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    return False
