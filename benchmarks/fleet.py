"""Fleets against as many bare spawns: wall time, each VM's own time, memory.

There are two kinds, since a `Fleet` refuses VMs that do not fit into the host's memory: `windows`
(2048 MiB, OVMF with Secure Boot, TPM) and `linux` (128 MiB, OVMF, no TPM), both with an empty disk.
If not even that many VMs of the first kind fit, `asyncio.gather()` of `start()` starts them, which
asks only for the memory of one VM.

`booting`: the clock stops when all processors run. The floor lets each VM run as soon as it can;
the library lets all run once the last is launched. For 16 VMs a second floor waits like the
library. `paused`: the library has no start without `cont`, so each VM is paused as soon as it is
handed over; the floor's VMs never run at all. The floor runs `qemu-img create` for each VM, as a
launcher of one VM would; for 16 VMs also without.

    python benchmarks/fleet.py [-n 3] [--sizes 1,4,8,16,32] [--json]
    python benchmarks/fleet.py --max-booting 1,2,4,8,16   # which default is best
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Results, show
from benchmarks.floor import launched
from benchmarks.launch import blank
from benchmarks.memory import pss, python_growth
from smolvm_async import AcceleratorWarning, AsyncSmolVM, Fleet
from smolvm_async.fleet.memory import PROMISES
from smolvm_async.host.accelerator import TCG

SIZES = (1, 4, 8, 16, 32)
MEMORY = {"windows": 2048, "linux": 128}  # MiB
OTHERS: Mapping[str, Mapping[str, bool]] = {
    "without qemu-img beside the floor": {"overlay": False},
    "`cont` held back in the floor, too": {"together": True},
}
GUESTS = 4  # of the built-in Linux, for max_booting=


@dataclass(frozen=True)
class Taken:
    """One fleet: seconds until all VMs ran, seconds of the median VM, MiB of each process."""

    wall: float
    each: float
    memory: Mapping[str, float]


def template(kind: str, image: Path) -> dict[str, Any]:
    """Return the arguments of each VM."""
    return {"os": kind, "image": image, "memory": MEMORY[kind], "accel": "tcg"}


def bare(
    kind: str, image: Path, size: int, *, run: bool, overlay: bool = True, together: bool = False
) -> Taken:
    """Spawn as many bare QEMUs at once, each with the `qemu-img create` of its overlay."""
    how = {"run": run, "overlay": overlay, "together": together}
    with launched(template(kind, image), size, **how) as vms:
        last = [vm.points.running if run else vm.points.first_answer for vm in vms]
        return Taken(max(last), statistics.median(last), _memory([vm.pids for vm in vms]))


async def ours(kind: str, image: Path, size: int, data_dir: Path, *, run: bool) -> Taken:
    """Start the VMs as a fleet, or with `asyncio.gather()`."""
    arguments: Any = {**template(kind, image), "data_dir": data_dir}
    gc.collect()
    if fits(kind, size):
        began = time.perf_counter()
        async with Fleet(arguments, size=size, until="firmware") as fleet:
            vms = await _handed_over(fleet, run)
            return _taken(vms, time.perf_counter() - began)
    vms = [AsyncSmolVM(**arguments) for _ in range(size)]
    try:
        began = time.perf_counter()
        await asyncio.gather(*(_start(vm, run) for vm in vms))
        return _taken(vms, time.perf_counter() - began)
    finally:
        await asyncio.gather(*(vm.delete() for vm in vms))


def fits(kind: str, size: int) -> bool:
    """Return whether a `Fleet` would take so many VMs."""
    return size * (MEMORY[kind] + TCG.overhead(MEMORY[kind])) <= PROMISES.capacity()


async def _handed_over(fleet: Fleet, run: bool) -> list[AsyncSmolVM]:
    vms = []
    async with asyncio.TaskGroup() as group:
        async for vm in fleet:
            vms.append(vm)
            if not run:
                group.create_task(vm.pause())
    return vms


async def _start(vm: AsyncSmolVM, run: bool) -> None:
    await vm.start()
    if not run:
        await vm.pause()


def _taken(vms: Sequence[AsyncSmolVM], wall: float) -> Taken:
    pids, each = [], []
    for vm in vms:
        supervisor: Any = vm._vm.run
        pids.append({child.name: child.identity.pid for child in supervisor.processes.children})
        each.append(supervisor.boot.last.elapsed)
    return Taken(wall, statistics.median(each), _memory(pids))


def _memory(pids: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Return the MiB of the average VM's processes."""
    return {name: statistics.mean(pss(of[name]) for of in pids) for name in pids[0]}


def measure(image: Path, count: int, sizes: Sequence[int]) -> Results:
    """Measure each size of each guest OS, paused and booting, in turns with its floor."""
    results = Results("Fleets")
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        runner.run(ours("linux", image, 2, Path(name), run=True))
        runner.run(ours("windows", image, 2, Path(name), run=True))
        for kind in MEMORY:
            for size in sizes:
                if not fits(kind, size):
                    results.notes.append(
                        f"{size} {kind} VMs of {MEMORY[kind]} MiB are more than a Fleet takes on "
                        "this host: they are started by gather()."
                    )
                for run in (False, True):
                    fleets = partial(ours, kind, image, size, Path(name), run=run)
                    bares = partial(bare, kind, image, size, run=run)
                    pairs = []
                    others: dict[str, list[Taken]] = {other: [] for other in _others(size, run)}
                    for round_ in range(count):
                        first = bares() if round_ % 2 == 0 else None
                        taken = runner.run(fleets())
                        pairs.append((first or bares(), taken))
                        for other, floors in others.items():
                            floors.append(bares(**OTHERS[other]))
                    _add(results, kind, size, run, pairs, others)
                if size > 1:
                    results.add(
                        f"{size} {kind} VMs: PSS that Python grows by, each VM",
                        [python_growth(kind, MEMORY[kind], image, size)],
                        "MiB",
                        headline=size == 16,
                    )
    return results


def _name(kind: str, size: int, run: bool) -> str:
    return f"{size} {kind} VMs, {'booting' if run else 'paused'}"


def _others(size: int, run: bool) -> Sequence[str]:
    """Return the other floors; a floor that costs a round each time is for one size only."""
    if size != 16:
        return ()
    return [name for name, how in OTHERS.items() if run or "together" not in how]


def _add(
    results: Results,
    kind: str,
    size: int,
    run: bool,
    pairs: Sequence[tuple[Taken, Taken]],
    others: Mapping[str, Sequence[Taken]],
) -> None:
    what = _name(kind, size, run)
    floors, library = zip(*pairs, strict=True)
    walls = Figure("all of them, library", [taken.wall for taken in library])
    named = {what: floors, **{f"{what}, {other}": bares for other, bares in others.items()}}
    for name, bares in named.items():
        results.compare(
            name,
            Figure("all of them, bare", [taken.wall for taken in bares]),
            walls,
            headline=size in (1, 16, 32),
        )
    results.add(f"{what}: the median VM, bare", [taken.each for taken in floors])
    results.add(f"{what}: the median VM, from its own start", [taken.each for taken in library])
    for process in library[0].memory:
        results.add(
            f"{what}: PSS of {process}, each VM",
            [taken.memory[process] for taken in library],
            "MiB",
            headline=size == 16 and not run and kind == "windows",
        )


async def booting(arguments: Any, size: int, until: str, most: int) -> float:
    """Return the seconds until a fleet with this `max_booting` has handed over its VMs."""
    began = time.perf_counter()
    async with Fleet(arguments, size=size, until=until, max_booting=most) as fleet:
        await fleet.all_ready()
        return time.perf_counter() - began


def measure_max_booting(image: Path, count: int, limits: Sequence[int]) -> Results:
    """Compare values of `max_booting`, for VMs without an operating system and for Linux guests."""
    results = Results("max_booting")
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        empty = {**template("linux", image), "data_dir": Path(name)}
        debian = {"accel": "tcg", "memory": 256, "boot": "cold", "data_dir": Path(name)}
        runner.run(booting(empty, 2, "firmware", 2))
        cases = [(empty, 16, "firmware"), (empty, 32, "firmware"), (debian, GUESTS, "ready")]
        for arguments, size, until in cases:
            most = [limit for limit in limits if limit <= size]
            rounds = [
                [runner.run(booting(arguments, size, until, limit)) for limit in most]
                for _ in range(count)
            ]
            for limit, values in zip(most, zip(*rounds, strict=True), strict=True):
                results.add(f"{size} VMs until {until}, max_booting={limit}", values, "s")
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--sizes", type=numbers, default=SIZES)
    parser.add_argument("--max-booting", type=numbers, help="compare these instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore", AcceleratorWarning)
    with tempfile.TemporaryDirectory() as directory:
        image = blank(Path(directory))
        if options.max_booting:
            results = measure_max_booting(image, options.n, options.max_booting)
        else:
            results = measure(image, options.n, options.sizes)
    found = results.to_json()
    print(json.dumps(found, indent=1)) if options.json else show(found)


def numbers(text: str) -> tuple[int, ...]:
    """Parse `1,4,8`."""
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
