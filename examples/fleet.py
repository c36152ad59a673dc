"""Twenty Linux sandboxes at once: each runs a command, and a live table shows their states.

python examples/fleet.py [--size 20] [--memory 192]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from rich.live import Live
from rich.table import Table

from smolvm_async import AsyncSmolVM, Fleet, FleetStatus, SmolVMError

STYLES = {"waiting": "dim", "ready": "green", "failed": "bold red", "deleted": "dim"}


def table(status: FleetStatus, answers: dict[str, str], seconds: float) -> Table:
    """Return a table of the fleet's VMs."""
    counts = f"{status.waiting} wait, {status.booting} boot, {status.ready} are ready"
    shown = Table(title=f"{seconds:.0f} s: {counts}, {len(answers)} have answered")
    for column in ("VM", "state", "since", "answer"):
        shown.add_column(column, justify="right" if column == "since" else "left")
    for member in status.members:
        state = f"waiting for {member.waits_for}" if member.waits_for else member.state
        answer = answers.get(member.vm_id, member.error)
        since = f"{member.seconds:.0f} s"
        shown.add_row(member.vm_id, state, since, answer, style=STYLES.get(member.state, "yellow"))
    return shown


async def main(size: int, memory: int) -> None:
    """Start the fleet, and run a command in each VM."""
    began = time.monotonic()
    answers: dict[str, str] = {}

    async def ask(vm: AsyncSmolVM) -> None:
        result = await vm.run(
            "echo $(hostname) has $(nproc) processor, up for $(cut -d' ' -f1 /proc/uptime) s",
            timeout=120,
        )
        answers[vm.vm_id] = result.stdout.strip()

    async def refresh(live: Live, fleet: Fleet) -> None:
        while True:
            live.update(table(fleet.status(), answers, time.monotonic() - began), refresh=True)
            await asyncio.sleep(0.25)

    async with Fleet({"memory": memory}, size=size) as fleet, asyncio.TaskGroup() as group:
        with Live(auto_refresh=False) as live:
            refreshing = group.create_task(refresh(live, fleet))
            asking = [group.create_task(ask(vm)) async for vm in fleet]
            await asyncio.wait(asking)
            refreshing.cancel()
            live.update(table(fleet.status(), answers, time.monotonic() - began), refresh=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=20, help="number of VMs (default 20)")
    parser.add_argument("--memory", type=int, default=192, help="MiB of each VM (default 192)")
    options = parser.parse_args()
    try:
        asyncio.run(main(options.size, options.memory))
    except KeyboardInterrupt:
        sys.exit("Interrupted; all VMs were deleted.")
    except BaseExceptionGroup as errors:
        known, unknown = errors.split(SmolVMError)
        if unknown is not None or known is None:
            raise
        sys.exit("\n".join(f"{type(error).__name__}: {error}" for error in known.exceptions))
    except SmolVMError as error:
        sys.exit(f"{type(error).__name__}: {error}")
