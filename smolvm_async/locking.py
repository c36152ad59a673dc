"""One lock for everything that processes share: flock(2), which its holder's death releases."""

from __future__ import annotations

import fcntl


def try_lock(fd: int) -> bool:
    """Lock the open file or directory `fd`, if nobody else holds it; closing it unlocks."""
    return _try(fd, fcntl.LOCK_EX)


def lock(fd: int) -> None:
    """Lock it, once nobody else holds it."""
    fcntl.flock(fd, fcntl.LOCK_EX)


def is_locked(fd: int) -> bool:
    """Whether somebody has locked it; `fd` has to be closed soon after, since it is shared."""
    return not _try(fd, fcntl.LOCK_SH)


def _try(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
