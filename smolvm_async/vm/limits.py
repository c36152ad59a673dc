"""What a VM may take of the host: whether it fits, and what bounds QEMU once it runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import HostError
from smolvm_async.foundation.locking import LockFile, poll
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.host.memory import available_memory
from smolvm_async.state.directory import BUSY
from smolvm_async.state.record import ACTIVE
from smolvm_async.state.registry import LOCK, survey

SYSTEM_RUNTIME = Path("/run")  # where systemd itself has its socket; a user's is elsewhere


@asynccontextmanager
async def admission(config: VMConfig) -> AsyncIterator[None]:
    """Around the writing of a starting VM's record: refuse the VM if it does not fit.

    Memory that other VMs were promised and have not touched is not counted, unless
    `Limits.max_memory` says so: then two that start at once are judged one after the other.

    Raises:
        HostError: If it does not fit; with the figures.
        OSError: If the lock cannot be made.
    """
    memory = await in_thread(available_memory)
    if config.memory > memory.available:
        raise HostError(
            f"memory={config.memory} MiB does not fit: {memory.available} MiB of "
            f"{memory.total} MiB are available (limit: {memory.limit}). Pass a smaller memory=, "
            "stop other VMs, or free memory of the host."
        )
    if config.limits.max_memory is None:
        yield
        return
    lock = LockFile(config.data_dir / LOCK)
    try:
        if not await poll(lock.try_lock, BUSY):
            raise HostError(
                "max_memory= could not be checked: another process has held "
                f"{str(config.data_dir / LOCK)!r} for {BUSY:g} s."
            )
        await in_thread(_check_sum, config, config.limits.max_memory)
        yield
    finally:
        await in_thread(lock.unlock)


def _check_sum(config: VMConfig, max_memory: int) -> None:
    others = [
        record.config.memory
        for record, held in survey(config.data_dir)
        if held and record.status in ACTIVE and record.config.vm_id != config.vm_id
    ]
    if config.memory + sum(others) > max_memory:
        raise HostError(
            f"memory={config.memory} MiB does not fit: max_memory={max_memory} MiB, and "
            f"{len(others)} running VMs have {sum(others)} MiB of it. Pass a smaller memory=, "
            "stop other VMs, or raise max_memory."
        )


def scope_prefix(config: VMConfig) -> tuple[str, ...]:
    """What runs QEMU in a systemd scope with its bounds (systemd.resource-control(5)).

    Raises:
        HostError: If bounds are set and there is no systemd to make a scope.
    """
    limits = config.limits
    properties = []
    if limits.vm_memory is not None:
        # Without swap, or a guest over its bound would drag the host down instead of ending.
        properties += [f"MemoryMax={limits.vm_memory}M", "MemorySwapMax=0"]
    if limits.vm_cpus is not None:
        properties.append(f"CPUQuota={limits.vm_cpus * 100:.0f}%")
    if not properties:
        return ()
    systemd_run = shutil.which("systemd-run")
    root = os.geteuid() == 0
    runtime = SYSTEM_RUNTIME if root else Path(os.environ.get("XDG_RUNTIME_DIR", "/nonexistent"))
    if systemd_run is None or not (runtime / "systemd" / "private").exists():
        raise HostError(
            "limits= with vm_memory or vm_cpus needs systemd: there is no "
            f"{'systemd-run' if systemd_run is None else 'service manager of this user'} here. "
            "Log in through systemd (loginctl enable-linger makes it stay), or leave them out."
        )
    return (
        *(systemd_run, *(() if root else ("--user",)), "--scope", "--quiet", "--collect"),
        *(word for value in properties for word in ("--property", value)),
        "--",
    )


def oom_kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """How many processes the kernel's out-of-memory killer has ended on this host so far."""
    try:
        lines = vmstat.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def oom_hint(before: int) -> str:
    """A sentence, if that killer has ended processes since there were `before` of them."""
    kills = oom_kills() - before
    if not kills:
        return ""
    return (
        "the kernel's out-of-memory killer has ended "
        f"{kills} process{'es' if kills > 1 else ''} since it started, this one it seems: "
        "use a smaller memory=, or fewer VMs at once. "
    )
