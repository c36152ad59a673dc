"""Orphans: processes of a VM that still run although their owner is dead.

Normally the kernel kills a VM's processes when their owner dies. But a dying process can survive
its owner for a moment, and hold locks on the VM's files meanwhile. So the next process that gets
the VM's directory ends them first. It knows them from the record, and must not kill a stranger:

1. A process id alone proves nothing: the kernel may have given it to a new process. So a pidfd is
   opened first; from then on it means one process, and a signal sent through it reaches no other.
2. Then the identity is compared: the record has the start time beside the id.
3. Then the working directory, which is the VM's. The start time counts from the host's boot: after
   a reboot, a stranger may have the same id and start time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Iterator

from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.process import Identity

logger = get_logger(__name__)

KILLED = 10.0  # seconds in which the kernel has to end a process after SIGKILL


async def end_orphans(identities: Iterable[Identity], dir_fd: int) -> None:
    """Kill the processes that still run in the directory `dir_fd`, and wait for their ends."""
    for identity in identities:
        with killed_orphan(identity, dir_fd) as pidfd:
            if pidfd is not None:
                logger.info("killing process %d, whose owner is dead", identity.pid)
                async with asyncio.timeout(KILLED):
                    await _readable(pidfd)


@contextlib.contextmanager
def killed_orphan(identity: Identity, dir_fd: int) -> Iterator[int | None]:
    """Kill the process, if it still exists and works in `dir_fd`; yield its pidfd, or `None`."""
    try:
        pidfd = os.pidfd_open(identity.pid)
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
        return True  # it is dying and has left its directory; its last thread may still hold locks
    except OSError:
        return False


async def _readable(pidfd: int) -> None:
    """Wait until a process ends, which makes its pidfd readable."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
