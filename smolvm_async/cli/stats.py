"""`stats`: the resources that a VM of any process uses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

import typer

from smolvm_async import VMNotRunningError, VMStats
from smolvm_async.cli.command import DataDir, Json, VMId, execute, running_vm
from smolvm_async.cli.output import in_units, say, write_json

INTERVAL = 2.0  # seconds between two rows of `--watch`
COLUMNS = {
    "PROCESSORS": 10,
    "RESIDENT": 9,
    "OWN": 9,
    "READ": 10,
    "WRITTEN": 10,
    "DISK": 10,
    "RECEIVED": 10,
    "SENT": 10,
}


def stats(
    vm_id: VMId,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show a row every 2 s, until the VM ends.")
    ] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Show the resources that a VM of any process uses, seen from the host.

    PROCESSORS is the number of the host's processors that are in use: first on average since the
    VM's start, then since the last row. RESIDENT is the memory that QEMU and swtpm use; OWN is the
    part of it that no other VM shares. READ and WRITTEN is what the guest has read from and written
    to its disk; DISK is the size of the VM's files on the host. RECEIVED and SENT is the guest's
    network traffic since the first time that anybody has asked for the VM's stats.
    """

    async def work() -> None:
        async with running_vm(vm_id, data_dir) as vm:
            now, before = await vm.stats(), None
            if not json:
                say(_row([*COLUMNS]))
            while True:
                used = _processors(now, before)
                if json:
                    write_json({"vm_id": vm_id, "processors": used, **now._asdict()})
                else:
                    say(_row(_cells(now, used)))
                if not watch:
                    return
                await asyncio.sleep(INTERVAL)
                try:
                    now, before = await vm.stats(), now
                except VMNotRunningError:  # the VM has ended
                    return

    execute(work(), json=json)


def _processors(now: VMStats, before: VMStats | None) -> float:
    if before is None or now.uptime <= before.uptime:
        return now.processors
    return (now.processor_time - before.processor_time) / (now.uptime - before.uptime)


def _cells(stats: VMStats, processors: float) -> list[str]:
    network = (stats.network_received, stats.network_sent)
    return [
        f"{processors:.2f}",
        f"{stats.resident} MiB",
        f"{stats.own_memory} MiB",
        *map(in_units, (stats.disk_read, stats.disk_written, stats.disk_size)),
        *("-" if count is None else in_units(count) for count in network),
    ]


def _row(cells: Sequence[str]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True))
