"""Locks between processes, by flock(2): the kernel releases a lock when its process dies.

asyncio cannot wait for flock: a blocking call would need a thread for each waiter, and the thread
could not be cancelled. So `poll` tries again and again. All code that waits for a lock, or for
another change that another process makes, uses `poll`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

from smolvm_async.foundation.fork import private
from smolvm_async.foundation.tasks import in_thread

POLL = 0.02  # seconds between two attempts
TURN, TURN_POLL = 120.0, 0.2  # seconds to wait for a turn, and between two attempts of many waiters


async def poll(
    attempt: Callable[[], bool], timeout: float = math.inf, interval: float = POLL
) -> bool:
    """Call `attempt` in the loop's worker thread until it returns true, or for `timeout` seconds.

    Return whether `attempt` returned true. A cancellation may arrive after `attempt` took a lock.
    So `attempt` stores the lock in an object, and the caller releases it in `finally` or `except`.
    """
    deadline = time.monotonic() + timeout
    while not await in_thread(attempt):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(interval)
    return True


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Try to lock the open file or directory `fd`, and return whether this succeeded.

    Closing `fd` releases the lock. A shared lock prevents exclusive locks, but not shared locks.
    Forked children do not keep the lock.
    """
    private(fd)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some file systems have no locks: the message must not be about files
        raise OSError(error.errno, f"flock(2) failed: {error.strerror}") from error
    return True


@contextlib.asynccontextmanager
async def turn_at(path: Path) -> AsyncIterator[None]:
    """Take turns with other processes during the block, by a lock on the file `path`.

    The file may be missing, and a holder may hang. So the block may begin without the lock, at the
    latest after `TURN` seconds.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # the file system has no locks
            await poll(partial(try_lock, fd), TURN, TURN_POLL)
        yield
    finally:
        await in_thread(partial(os.close, fd))


def is_locked(fd: int) -> bool:
    """Return whether a process has locked `fd` exclusively.

    If no process has, `fd` holds a shared lock after this call: close `fd` soon.
    """
    return not try_lock(fd, shared=True)


def excludes_others(dir_fd: int) -> bool:
    """Return whether the lock on the open directory `dir_fd` keeps a second descriptor from a lock.

    Some sandboxes pretend that flock(2) succeeds; a lock that is free there proves nothing.
    """
    second = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return not try_lock(second)
    finally:
        os.close(second)


class LockFile:
    """A lock file, which exists only while it is locked and which only this user can open.

    Attributes:
        fd: The descriptor of the locked file; -1 while this object does not hold the lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fd = -1

    def try_lock(self) -> bool:
        """Try to create the file and lock it, and return whether this succeeded."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        if try_lock(fd):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.lstat(self._path)):
                    self.fd = fd
                    return True
        os.close(fd)  # another process holds the lock, or has just removed the file
        return False

    def unlock(self) -> None:
        """Remove the file and release the lock, if this object holds the lock."""
        if self.fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self.fd)
            self.fd = -1

    @contextlib.asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Wait for the lock, hold it during the block, then release it."""
        try:
            await poll(self.try_lock)
            yield
        finally:
            await in_thread(self.unlock)
