"""Limits of a VM: check that its memory fits into the host, and bound QEMU while it runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import HostError
from smolvm_async.foundation.locking import LockFile, poll
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.host.accelerator import OVERHEAD
from smolvm_async.host.memory import available_memory
from smolvm_async.state.directory import BUSY
from smolvm_async.state.status import ACTIVE

SYSTEM_RUNTIME = Path("/run")  # for systemd's socket; each user's systemd has another directory


async def admit(config: VMConfig, write: Callable[[], None]) -> None:
    """Write the VM's record by `write`, in a thread, if the VM fits into the host.

    Memory that running VMs do not use yet counts as available. With `Limits.max_memory`, the whole
    memory of running VMs counts as used, and a lock admits only one VM at a time.

    Raises:
        HostError: The VM does not fit. The message has the figures.
        OSError: The lock file cannot be made.
    """
    if config.limits.max_memory is None:
        await in_thread(_admit, config, write)
        return
    from smolvm_async.state.registry import LOCK

    lock = LockFile(config.data_dir / LOCK)
    try:
        if not await poll(lock.try_lock, BUSY):
            raise HostError(
                "max_memory= could not be checked: another process has locked "
                f"{str(config.data_dir / LOCK)!r} for {BUSY:g} s. Try again."
            )
        await in_thread(_admit, config, write)
    finally:
        await in_thread(lock.unlock)


def _admit(config: VMConfig, write: Callable[[], None]) -> None:
    memory = available_memory()
    if config.memory > memory.available:
        raise HostError(
            f"memory={config.memory} MiB does not fit: {memory.available} MiB of "
            f"{memory.total} MiB are available (limit: {memory.limit}).",
            hint="Pass a smaller memory=, stop other VMs, or free memory on the host.",
            missing=("memory",),
        )
    if config.limits.max_memory is not None:
        _check_sum(config, config.limits.max_memory)
    write()


def check_clones(count: int, memory: int) -> None:
    """Check that clones that start together fit into the host, each with its own pages at least.

    `admit()` sees only one VM, and clones take their memory after it: many clones at once would
    all be admitted, and the kernel would then kill some process.

    Raises:
        HostError: They do not fit: the message has the figures. Or no descriptors are left.
    """
    try:
        host = available_memory()
    except OSError as error:
        raise HostError(
            f"count={count}: the host's free memory cannot be read: {error}."
        ) from error
    if memory + (count - 1) * OVERHEAD > host.available:
        raise HostError(
            f"count={count} clones do not fit: each takes at least {OVERHEAD} MiB, and "
            f"{host.available} MiB of {host.total} MiB are available (limit: {host.limit}).",
            hint="Pass a smaller count=, stop other VMs, or free memory on the host.",
            missing=("memory",),
        )


def _check_sum(config: VMConfig, max_memory: int) -> None:
    from smolvm_async.state.registry import survey

    others = [
        record.config.memory
        for record, status in survey(config.data_dir)
        if status in ACTIVE and record.config.vm_id != config.vm_id
    ]
    if config.memory + sum(others) > max_memory:
        raise HostError(
            f"memory={config.memory} MiB does not fit: max_memory={max_memory} MiB, and "
            f"{len(others)} running VMs already use {sum(others)} MiB.",
            hint="Pass a smaller memory=, stop other VMs, or raise max_memory.",
            missing=("memory",),
        )


def scope_prefix(config: VMConfig) -> tuple[str, ...]:
    """Return the command that runs QEMU in a systemd scope with limits; empty without limits.

    See systemd.resource-control(5).

    Raises:
        HostError: The VM has limits, but the host has no systemd to make a scope.
    """
    limits = config.limits
    properties = []
    if limits.vm_memory is not None:
        # No swap: a VM over its limit must end instead of slowing the host down by swapping.
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
            "limits= with vm_memory or vm_cpus needs systemd, but this host has no "
            f"{'systemd-run' if systemd_run is None else 'running service manager for this user'}.",
            hint="Log in through systemd (loginctl enable-linger keeps the service manager "
            "running), or leave vm_memory and vm_cpus out.",
            missing=("systemd",),
        )
    return (
        *(systemd_run, *(() if root else ("--user",)), "--scope", "--quiet", "--collect"),
        *(word for value in properties for word in ("--property", value)),
        "--",
    )


def oom_kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """Return the number of processes that the out-of-memory killer has ended since boot."""
    try:
        lines = vmstat.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def oom_reason(before: int) -> str:
    """Return a sentence if the out-of-memory killer has ended more processes than `before`."""
    kills = oom_kills() - before
    if not kills:
        return ""
    return (
        f"the kernel's out-of-memory killer has ended {kills} process{'es' if kills > 1 else ''} "
        "since QEMU started, probably QEMU too. "
    )
