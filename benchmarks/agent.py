"""The round trip of a command through the guest agent, against a bare `guest-exec`, in turns.

The guest is the stand-in of `examples/stand_in`, as a Linux guest with `channel="agent"`. The bare
`guest-exec` starts a shell and captures its output, and is polled each millisecond.

    python -m benchmarks.agent [-n 50] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Results, show
from smolvm_async import AcceleratorWarning, AsyncSmolVM
from smolvm_async.qemu.guest_agent import GuestAgent

EXAMPLES = Path(__file__).parents[1] / "examples"
POLL = 0.001  # seconds
BUDGET = 1.2  # run() / a bare guest-exec
COMMANDS = ("true", "echo hello")


async def bare(agent: GuestAgent, command: str) -> None:
    """Execute a command in a shell, and wait for its end and its output."""
    request = {"path": "/bin/sh", "arg": ["-c", command], "capture-output": True}
    started: Any = await agent.execute("guest-exec", request)
    status: Any = {"exited": False}
    while not status["exited"]:
        await asyncio.sleep(POLL)
        status = await agent.execute("guest-exec-status", {"pid": started["pid"]})


async def measure(rounds: int) -> Results:
    """Measure commands of a guest that is reached through its agent."""
    sys.path.append(str(EXAMPLES))
    from stand_in import build_stand_in

    image = await build_stand_in()
    alone: dict[str, list[float]] = {command: [] for command in COMMANDS}
    through: dict[str, list[float]] = {command: [] for command in COMMANDS}
    async with AsyncSmolVM(os="linux", image=image, channel="agent", accel="tcg") as vm:
        await vm.run("true")
        run: Any = vm._vm.run
        for command in COMMANDS * rounds:
            began = time.perf_counter()
            await bare(run.session.agent, command)
            middle = time.perf_counter()
            await vm.run(command)
            alone[command].append(middle - began)
            through[command].append(time.perf_counter() - middle)
        await vm.stop(timeout=0)
    results = Results("Round trip of a command through the guest agent")
    for command in COMMANDS:
        results.compare(
            f"command (`{command}`) through the guest agent",
            Figure("bare guest-exec of a shell, polled each millisecond", alone[command]),
            Figure("run()", through[command]),
            budget=BUDGET,
        )
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", "--rounds", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", AcceleratorWarning)
    results = asyncio.run(measure(options.rounds)).to_json()
    print(json.dumps(results, indent=1)) if options.json else show(results)


if __name__ == "__main__":
    main()
