"""Orphans: processes of a VM that still run although their owner is dead.

Normally, the kernel kills a VM's processes when their owner dies. But a dying process can survive
its owner for a moment, and hold locks on the VM's files meanwhile. So the next process that locks
the VM's directory kills the processes in the record. It must not kill any other process:

1. The kernel may have given the process id to a new process. So this module first opens a pidfd: a
   pidfd always refers to the same process, and a signal sent through it reaches no other process.
2. Then this module compares the start time of the process with the start time in the record.
3. Then this module compares the process's working directory with the VM's directory.
4. Process ids and start times mean something only in one boot and one PID namespace of one host. So
   the caller passes only processes that `Record.processes_here` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Iterator

from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.process import Identity, open_pidfd, send_signal

logger = get_logger(__name__)

KILLED = 10.0  # seconds to wait for the end of a process after SIGKILL


async def end_orphans(identities: Iterable[Identity], dir_fd: int) -> None:
    """Kill the processes that still run in the directory `dir_fd`, and wait until they end."""
    for identity in identities:
        with killed_orphan(identity, dir_fd) as pidfd:
            if pidfd is not None:
                logger.info("killing process %d, whose owner is dead", identity.pid)
                async with asyncio.timeout(KILLED):
                    await _readable(pidfd)


@contextlib.contextmanager
def killed_orphan(identity: Identity, dir_fd: int) -> Iterator[int | None]:
    """Kill the process if it exists and works in `dir_fd`; yield its pidfd, or `None` if not."""
    try:
        pidfd = open_pidfd(identity.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        found = identity.remains and _works_in(identity.pid, dir_fd)
        if found:
            send_signal(pidfd, identity, signal.SIGKILL)
        yield pidfd if found else None
    finally:
        os.close(pidfd)


def _works_in(pid: int, dir_fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/cwd"), os.fstat(dir_fd))
    except FileNotFoundError:
        return True  # a dying process has no directory, but its last thread may hold locks
    except OSError:
        return False


async def _readable(pidfd: int) -> None:
    """Wait until a pidfd is readable: its process has then ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
