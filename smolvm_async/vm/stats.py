"""The resources that a VM uses, seen from the host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from smolvm_async.errors import MonitorError, VMNotRunningError
from smolvm_async.foundation.process import Identity
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.host.usage import read_usage
from smolvm_async.qemu.monitor import Monitor
from smolvm_async.qemu.traffic import Traffic


class VMStats(NamedTuple):
    """The resources that a VM has used since its start, seen from the host.

    Attributes:
        uptime: Seconds since QEMU started.
        processor_time: Seconds of one processor that QEMU and swtpm have used.
        resident: MiB of the host's memory that QEMU and swtpm use now. The memory that clones share
            counts for each of them.
        own_memory: MiB of it that no other VM shares.
        disk_read: Bytes that the guest has read from its disk.
        disk_written: Bytes that the guest has written to its disk.
        disk_reads: The guest's requests to read.
        disk_writes: The guest's requests to write.
        disk_size: Bytes that the VM's files take on the host's disk. A layer that a snapshot shares
            counts, and the image does not.
        network_received: Bytes that the guest has received since the first `stats()`. That call, of
            any process, begins to count, and has `None`; so has each if the host cannot count.
        network_sent: Bytes that the guest has sent, likewise.
    """

    uptime: float
    processor_time: float
    resident: int
    own_memory: int
    disk_read: int
    disk_written: int
    disk_reads: int
    disk_writes: int
    disk_size: int
    network_received: int | None = None
    network_sent: int | None = None

    @property
    def processors(self) -> float:
        """The number of the host's processors that the VM has used on average."""
        return self.processor_time / self.uptime if self.uptime > 0 else 0.0


async def measure(
    processes: Iterable[Identity],
    own_memory: int,
    monitor: Monitor,
    traffic: Traffic,
    directory: Path,
) -> VMStats:
    """Return the resources that a running VM has used.

    Raises:
        VMNotRunningError: QEMU has ended.
    """
    devices = await monitor.execute("query-blockstats")
    usage = await in_thread(read_usage, processes)
    if usage is None:
        raise VMNotRunningError(f"{directory.name} has ended.")
    received = sent = None
    with contextlib.suppress(MonitorError, OSError):
        received, sent = await traffic.count()
    return VMStats(
        uptime=usage.uptime,
        processor_time=usage.processor_time,
        resident=usage.resident,
        own_memory=own_memory,
        disk_read=_total(devices, "rd_bytes"),
        disk_written=_total(devices, "wr_bytes"),
        disk_reads=_total(devices, "rd_operations"),
        disk_writes=_total(devices, "wr_operations"),
        disk_size=await in_thread(_size, directory),
        network_received=received,
        network_sent=sent,
    )


def _total(devices: Any, counter: str) -> int:
    """Return the sum of a counter of the guest's disk, from `query-blockstats`."""
    return sum(
        device["stats"][counter]
        for device in devices
        if str(device.get("node-name")).startswith("disk")
    )


def _size(directory: Path) -> int:
    size = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return size
