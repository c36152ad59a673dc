"""One lock for everything that processes share: flock(2), which its holder's death releases."""

from __future__ import annotations

import fcntl


def try_lock(fd: int) -> bool:
    """Lock the open file or directory `fd`, if nobody else holds it; closing it unlocks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
