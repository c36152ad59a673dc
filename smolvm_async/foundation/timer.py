"""A timer: a process that kills other processes when their time is over.

A thread would not do so in a process that hangs in native code, or is stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from smolvm_async.foundation.process import Child, Spawner, spawn

TIME_IS_OVER = "time is over"
_TIMER = """
import contextlib, os, signal, sys, time
_, seconds, text, *pids = sys.argv
children = {}
for pid in map(int, pids):
    with contextlib.suppress(ProcessLookupError):
        children[pid] = os.pidfd_open(pid)
time.sleep(float(seconds))
print(text, flush=True)
for pid, child in children.items():
    with contextlib.suppress(ProcessLookupError):
        try:
            signal.pidfd_send_signal(child, signal.SIGKILL)
        except PermissionError:  # by a seccomp profile
            os.kill(pid, signal.SIGKILL)
"""


async def kill_after(
    seconds: float, children: Sequence[Child], *, cwd: Path, log: Path, spawner: Spawner
) -> Child:
    """Start a timer: a process that kills `children`, even if this process hangs or is stopped.

    Just before that, the timer says `TIME_IS_OVER`. It dies with the thread of `spawner`. It holds
    pidfds, so it never kills another process that gets the id of a child.

    Raises:
        LaunchError: If the operating system cannot start the timer.
    """
    pids = [str(child.identity.pid) for child in children]
    argv = [sys.executable, "-I", "-S", "-c", _TIMER, str(seconds), TIME_IS_OVER, *pids]
    return await spawn("timer", argv, cwd=cwd, log=log, fds=(), spawner=spawner)
