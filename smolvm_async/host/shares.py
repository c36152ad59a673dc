"""The host directories that a guest sees: whether this user can share them, and their descriptors.

QEMU opens a directory by the descriptor that it inherits, so the directory that was checked is the
directory that the guest sees.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from smolvm_async.config.mounts import Mount
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.fork import private

# Their files act when they are read, and links such as /proc/self/root lead out of the directory.
NOT_FILES = ("/dev", "/proc", "/sys")
ATTRIBUTE = "user.virtfs.mode"  # QEMU keeps the guest's modes in such attributes


class Share(NamedTuple):
    """An open host directory, which QEMU inherits; QEMU itself refuses to write unless writable."""

    fd: int
    writable: bool


def check_shares(mounts: Iterable[Mount], data_dir: Path) -> None:
    """Check the host directories of a VM whose files are in `data_dir`.

    Raises:
        ConfigError: A directory does not exist, or cannot be shared.
    """
    for mount in mounts:
        os.close(_open(mount, data_dir))


def open_share(mount: Mount, data_dir: Path) -> Share:
    """Open a host directory, and check it again. The caller closes it."""
    return Share(_open(mount, data_dir), mount.writable)


def _open(mount: Mount, data_dir: Path) -> int:
    try:
        fd = private(os.open(mount.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise _cannot(mount, error) from error
    try:
        _check(mount, fd, data_dir)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(mount: Mount, fd: int, data_dir: Path) -> None:
    path, own = Path(os.path.realpath(mount.source)), Path(os.path.realpath(data_dir))
    if path == Path("/") or any(path.is_relative_to(system) for system in NOT_FILES):
        raise _wrong(mount, "it is the whole host, or not a directory of files", "share one below")
    if own.is_relative_to(path) or path.is_relative_to(own):
        advice = "share a directory below, or pass another data_dir="
        raise _wrong(mount, f"it would show the guest the files of VMs ({own})", advice)
    if not os.access(mount.source, os.X_OK):
        raise _wrong(mount, "this user may not open its files", f"run chmod u+x {path}")
    if not mount.writable:
        return
    if not os.access(mount.source, os.W_OK):
        raise _wrong(mount, "this user may not write to it", "mount it read-only")
    try:
        os.getxattr(fd, ATTRIBUTE)
    except OSError as error:
        if error.errno != errno.ENODATA:
            fault = "its file system does not keep extended attributes (user.*)"
            raise _wrong(mount, fault, "mount it read-only, or use another file system") from error


def _cannot(mount: Mount, error: OSError) -> ConfigError:
    if isinstance(error, FileNotFoundError):
        return _wrong(mount, "it does not exist", "create the directory first")
    if isinstance(error, NotADirectoryError):
        return _wrong(mount, "it is not a directory", "use upload_file() for a file")
    return _wrong(mount, os.strerror(error.errno or 0), "name a directory that you can read")


def _wrong(mount: Mount, fault: str, advice: str) -> ConfigError:
    return ConfigError(f"mounts: {str(mount.source)!r} cannot be shared: {fault}; {advice}.")
