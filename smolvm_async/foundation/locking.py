"""Locks between processes: flock(2), which the kernel releases when the holder dies.

flock has no way to wait that asyncio could use: a blocking call would take a thread for each
waiter, and the thread could not be cancelled. So `poll` is the one place that waits for a lock, and
for other changes that another process makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from smolvm_async.foundation.tasks import in_thread

POLL = 0.02  # seconds between two attempts


async def poll(attempt: Callable[[], bool], timeout: float = math.inf) -> bool:
    """Call `attempt` in the loop's thread until it returns true; return false after `timeout` s.

    A cancellation may arrive after `attempt` has taken a lock. So `attempt` stores the lock in an
    object, and the caller releases it in a `finally` or `except`.
    """
    deadline = time.monotonic() + timeout
    while not await in_thread(attempt):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL)
    return True


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Lock the open file or directory `fd`, unless it is locked; closing `fd` unlocks it.

    Any number of processes can have a shared lock, while no process has an exclusive one.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(fd: int) -> bool:
    """Return whether a process has locked `fd` exclusively.

    If not, `fd` has a shared lock afterwards: close it soon.
    """
    return not try_lock(fd, shared=True)


class LockFile:
    """A lock that is a file, for this user alone, which exists only while it is locked.

    Attributes:
        fd: The open file, which is locked; -1 while it is not held.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fd = -1

    def try_lock(self) -> bool:
        """Make the file and lock it, unless it is locked."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        if try_lock(fd):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.lstat(self._path)):
                    self.fd = fd
                    return True
        os.close(fd)  # it is locked, or its last holder has just removed it
        return False

    def unlock(self) -> None:
        """Remove the file and release the lock; do nothing if it is not held."""
        if self.fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self.fd)
            self.fd = -1

    @contextlib.asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Wait for the lock, and hold it in the block."""
        try:
            await poll(self.try_lock)
            yield
        finally:
            await in_thread(self.unlock)
