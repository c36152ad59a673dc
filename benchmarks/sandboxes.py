"""Fresh sandboxes that answer one command each: clones of a ready guest, against as many boots.

A `Fleet` starts them as it likes, and `map()` gives each job a VM of its own.

    python -m benchmarks.sandboxes [-n 3] [--count 16] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import warnings
from typing import Literal

from benchmarks.figures import Figure, Results, show
from smolvm_async import AcceleratorWarning, AsyncSmolVM, Fleet

COUNT = 16
BUDGET = 0.3  # the clones / the boots


async def answer(vm: AsyncSmolVM, _: int) -> str:
    """Return the answer of one sandbox."""
    return (await vm.run("uname -a")).stdout


async def answers(boot: Literal["cold", "warm"], count: int) -> float:
    """Return the seconds until `count` fresh sandboxes have answered."""
    began = time.perf_counter()
    async with Fleet({"accel": "tcg", "boot": boot}) as fleet:
        async for _ in fleet.map(answer, range(count)):
            last = time.perf_counter()
    return last - began


async def measure(rounds: int, count: int = COUNT) -> Results:
    """Measure warm and cold starts, in turns."""
    await answers("warm", 1)  # imports; makes the snapshot of the ready guest
    cold, warm = [], []
    for _ in range(rounds):
        cold.append(await answers("cold", count))
        warm.append(await answers("warm", count))
    results = Results(f"{count} fresh sandboxes of the built-in Linux, each answered one command")
    results.compare(
        f"{count} fresh sandboxes, each answered one command; the floor boots them",
        Figure("Fleet.map(), boot='cold'", cold, "s"),
        Figure("Fleet.map(), warm", warm, "s"),
        budget=BUDGET,
    )
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--count", type=int, default=COUNT, help=f"sandboxes (default {COUNT})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore", AcceleratorWarning)
    results = asyncio.run(measure(options.n, options.count)).to_json()
    print(json.dumps(results, indent=1)) if options.json else show(results)


if __name__ == "__main__":
    main()
