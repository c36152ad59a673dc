"""Processes that a dead owner left: recognised by their identity and the directory they hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Iterator

from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.process import Identity

logger = get_logger(__name__)

ENDED = 10.0  # seconds for the kernel to end a process after SIGKILL


async def end_orphans(identities: Iterable[Identity], dir_fd: int) -> None:
    """Kill those of `identities` that still run in the directory `dir_fd`, and wait until they end.

    Another process that was given the same id meanwhile is left alone, as is one that has
    another working directory.

    Raises:
        TimeoutError: If the kernel does not end one within 10 s.
    """
    for identity in identities:
        with killed_orphan(identity, dir_fd) as pidfd:
            if pidfd is not None:
                logger.info("ending process %d, which its dead owner left", identity.pid)
                async with asyncio.timeout(ENDED):
                    await _readable(pidfd)


@contextlib.contextmanager
def killed_orphan(identity: Identity, dir_fd: int) -> Iterator[int | None]:
    """Kill a process, if it still is that one and works in `dir_fd`; yields its pidfd if so."""
    try:
        pidfd = os.pidfd_open(identity.pid)  # from here on the id cannot mean another process
    except ProcessLookupError:
        yield None
        return
    try:
        found = identity.remains and _works_in(identity.pid, dir_fd)
        if found:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        yield pidfd if found else None
    finally:
        os.close(pidfd)


def _works_in(pid: int, dir_fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/cwd"), os.fstat(dir_fd))
    except FileNotFoundError:
        return True  # it is dying and has no directory any more; its last thread may have locks yet
    except OSError:
        return False


async def _readable(pidfd: int) -> None:
    """Wait for a process's end, which makes its pidfd readable."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
