"""Snapshots, forks and clones: until a clone runs, the guest's stand-still, memory, stalls.

The floor of a clone is the same QEMU, spawned bare, that loads the same snapshot (`restore.py`).
Both take turns, and the clock stops when the clone's processors run. A clone of the built-in Linux
is handed over a little later, when its parked process has set it right. The Windows class is the
stand-in of `examples/stand_in`.

The times for which a guest stands still are the time stamps of QEMU's events STOP and RESUME. The
guest cannot measure them: its clock stands still, too.

    python -m benchmarks.clones [-n 5] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import Figure, Results, show
from benchmarks.launch import longest_stall
from benchmarks.memory import pss
from benchmarks.restore import Restored, restore
from smolvm_async import AcceleratorWarning, AsyncSmolVM, Rung
from smolvm_async.foundation.progress import Progress
from smolvm_async.qemu.events import Event, parse_event
from smolvm_async.state.snapshots import SNAPSHOTS

EXAMPLES = Path(__file__).parents[1] / "examples"
DEBIAN, WINDOWS = "debian", "windows"  # the names of the snapshots
MEMORY = 512  # MiB
IDLING = 0.5  # seconds; on a busy machine, the loop stalls without any work, too
# The budgets: the library / the floor, ms, MiB.
CLONE, BOOTED, CLONED, STALL, IDLE = 1.3, 100.0, 1000.0, 10.0, 130.0


class Cloned(NamedTuple):
    """One clone: seconds until its processors ran, until it was handed over, until it was off."""

    running: float
    handed_over: float
    off: float


async def take_snapshot(name: str, data_dir: Path, template: Any) -> None:
    """Boot a VM until it is ready, and take a snapshot."""
    async with AsyncSmolVM(**template, data_dir=data_dir, accel="tcg") as vm:
        await vm.wait_for("ready")
        await vm.snapshot(name)
        await vm.stop(timeout=0)


async def clone(name: str, data_dir: Path, *, power_off: bool = False) -> Cloned:
    """Start one clone, and delete it; before that, press the power button if `power_off`."""
    running: list[float] = []

    def note(progress: Progress) -> None:
        if progress.stage == "boot" and "restored from a snapshot" in progress.message:
            running.append(time.perf_counter())

    began = time.perf_counter()
    vm = await AsyncSmolVM.from_snapshot(name, data_dir=data_dir, on_progress=note)
    handed_over = time.perf_counter()
    report = await vm.stop(timeout=None if power_off else 0)
    off = time.perf_counter()
    assert not power_off or report.rung is Rung.POWERDOWN, report
    await vm.delete()
    return Cloned(running[0] - began, handed_over - began, off - began)


@contextmanager
def watched(vm: AsyncSmolVM) -> Iterator[list[Event]]:
    """Yield a list of QEMU's events: the library hides STOP and RESUME of a snapshot."""
    run: Any = vm._vm.run
    events, found = run._monitor._client.events, list[Event]()
    hand_on = events.event_filter

    def note(message: dict[str, Any]) -> bool:
        found.append(parse_event(message))
        return bool(hand_on(message))

    events.event_filter = note
    try:
        yield found
    finally:
        events.event_filter = hand_on


def stood_still(events: Sequence[Event]) -> float:
    """Return the seconds between each STOP and the next RESUME, added up."""
    seconds, stopped = 0.0, None
    for event in events:
        if event.name == "STOP" and stopped is None:
            stopped = event.timestamp
        elif event.name == "RESUME" and stopped is not None:
            seconds, stopped = seconds + event.timestamp - stopped, None
    return seconds


async def snapshot(vm: AsyncSmolVM) -> None:
    """Take a snapshot, and delete it."""
    await vm.snapshot("passing")
    await AsyncSmolVM.delete_snapshot("passing", data_dir=vm._vm.config.data_dir)


async def fork(vm: AsyncSmolVM) -> None:
    """Fork a VM once, and delete the clone."""
    for copy in await vm.fork():
        await copy.delete()


async def stand_still(work: Callable[[AsyncSmolVM], Awaitable[None]], vm: AsyncSmolVM) -> float:
    """Return the seconds that a VM's guest stands still during the work."""
    with watched(vm) as events:
        await work(vm)
    return stood_still(events)


async def stall(work: Awaitable[None]) -> float:
    """Return the loop's longest stall during the work; watching takes a processor of its own."""
    watching = asyncio.ensure_future(longest_stall())
    await asyncio.sleep(0)
    await work
    watching.cancel()
    return await watching


async def warm_start(data_dir: Path) -> None:
    """Start the built-in Linux from the cache of ready guests, and delete it."""
    vm = AsyncSmolVM(accel="tcg", memory=MEMORY, data_dir=data_dir)
    await vm.start()
    await vm.delete()


@asynccontextmanager
async def running_pair(data_dir: Path) -> AsyncIterator[tuple[AsyncSmolVM, AsyncSmolVM]]:
    """Yield a ready VM that has booted, and a clone of it."""
    template: Any = {"boot": "cold", "accel": "tcg", "memory": MEMORY, "data_dir": data_dir}
    async with AsyncSmolVM(**template) as vm:
        await vm.wait_for("ready")
        (copy,) = await vm.fork()
        async with copy:
            yield vm, copy
            await copy.stop(timeout=0)
        await vm.stop(timeout=0)


async def measure_running(data_dir: Path, rounds: int, results: Results) -> None:
    """Measure snapshots and forks of running VMs."""
    kinds = {"snapshot()": snapshot, "fork()": fork}
    async with running_pair(data_dir) as (booted, cloned):
        sources = {"a VM that booted": (booted, BOOTED), "a clone": (cloned, CLONED)}
        for source, (vm, budget) in sources.items():
            process: Any = vm._vm.run
            idle = pss(process.processes.qemu.identity.pid)
            name = f"memory of {source} of {MEMORY} MiB, idle: PSS of QEMU"
            most = IDLE if vm is cloned else None
            results.add(name, [idle], "MiB", headline=True, budget=most)
            for kind, work in kinds.items():
                still = [await stand_still(work, vm) for _ in range(rounds)]
                name = f"{kind} of {source} of {MEMORY} MiB: the guest stands still"
                results.add(name, still, headline=True, budget=budget)
        await warm_start(data_dir)
        stalls: dict[str, Callable[[], Awaitable[None]]] = {
            f"{IDLING:g} s without any work": partial(asyncio.sleep, IDLING),
            "a warm start": partial(warm_start, data_dir),
            **{f"{kind} of a clone": partial(work, cloned) for kind, work in kinds.items()},
            **{kind: partial(work, booted) for kind, work in kinds.items()},
        }
        for name, start in stalls.items():
            longest = [await stall(start()) for _ in range(rounds)]
            name = f"longest stall of the event loop in {name}"
            results.add(name, longest, headline=True, budget=STALL)


def measure(rounds: int) -> Results:
    """Measure all."""
    sys.path.append(str(EXAMPLES))
    from stand_in import build_stand_in

    results = Results("Snapshots, forks and clones")
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        data_dir = Path(name)
        image = runner.run(build_stand_in())
        debian = {"boot": "cold", "memory": MEMORY}
        runner.run(take_snapshot(DEBIAN, data_dir, debian))
        runner.run(take_snapshot(WINDOWS, data_dir, {"os": "windows", "image": image}))
        for kind, what in ((DEBIAN, "the built-in Linux"), (WINDOWS, "the Windows class")):
            off = kind == WINDOWS
            pairs: list[tuple[Restored, Cloned]] = []
            for round_ in range(rounds + 1):
                bare = partial(restore, data_dir / SNAPSHOTS / kind, power_off=off)
                first = bare() if round_ % 2 == 0 else None
                cloned = runner.run(clone(kind, data_dir, power_off=off))
                pairs.append((first or bare(), cloned))
            _compare(results, what, pairs[1:])  # the first round warms the page cache
        runner.run(measure_running(data_dir, rounds, results))
    return results


def _compare(results: Results, what: str, pairs: Sequence[tuple[Restored, Cloned]]) -> None:
    floors, clones = zip(*pairs, strict=True)
    running = Figure("bare restore", [floor.running for floor in floors])
    results.compare(
        f"clone of {what}, to running processors",
        running,
        Figure("from_snapshot(), until the processors run", [each.running for each in clones]),
        budget=CLONE,
    )
    results.compare(
        f"clone of {what}, until it is handed over",
        running,
        Figure("from_snapshot()", [each.handed_over for each in clones]),
    )
    if offs := [floor.off for floor in floors if floor.off is not None]:
        results.compare(
            f"clone of {what}, until its power button has ended it",
            Figure("bare restore, system_powerdown", offs),
            Figure("from_snapshot(), stop()", [each.off for each in clones]),
            budget=CLONE,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore", AcceleratorWarning)
    results = measure(options.n).to_json()
    print(json.dumps(results, indent=1)) if options.json else show(results)


if __name__ == "__main__":
    main()
