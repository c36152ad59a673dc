"""The status of a VM."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The status of a VM.

    PAUSED: `pause()` stopped the guest's processors, or QEMU did so when it could not write to the
    disk. ORPHANED: the owner died without stopping the VM. `prune()`, or the next `start()` with
    the VM's id, removes the VM's files; a kept VM becomes `stopped` instead. ELSEWHERE: the owner
    is on another host that shares the data directory; nothing here can tell whether the VM runs.
    """

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    CRASHED = "crashed"
    ORPHANED = "orphaned"
    ELSEWHERE = "elsewhere"
    DELETED = "deleted"


# In these states, the VM may have processes.
ACTIVE = (Status.STARTING, Status.RUNNING, Status.PAUSED, Status.STOPPING)
