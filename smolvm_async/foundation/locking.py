"""One lock for everything that processes share: flock(2), which its holder's death releases."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


def try_lock(fd: int) -> bool:
    """Lock the open file or directory `fd`, if nobody else holds it; closing it unlocks."""
    return _try(fd, fcntl.LOCK_EX)


def try_lock_file(path: Path) -> int:
    """Make and lock a file that is for this user alone; -1 if somebody else holds it.

    `unlock_file()` removes it.

    Raises:
        OSError: If it cannot be made.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if try_lock(fd):
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                return fd
    os.close(fd)  # it is held, or its last holder has just removed it
    return -1


def unlock_file(fd: int, path: Path) -> None:
    """Remove the file, and give its lock back."""
    path.unlink(missing_ok=True)
    os.close(fd)


def is_locked(fd: int) -> bool:
    """Whether somebody has locked it; `fd` has to be closed soon after, since it is shared."""
    return not _try(fd, fcntl.LOCK_SH)


def _try(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def try_share(fd: int) -> bool:
    """Lock the open file `fd` along with others who share it, if nobody has it alone."""
    return _try(fd, fcntl.LOCK_SH)
