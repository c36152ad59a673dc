"""Launch time against the floor, import time, Python's own time, the event loop's longest stall.

The floor is the cost without this library: QEMU and swtpm, spawned bare and at once with the same
command lines, and a `qemu-img create` of an overlay beside them (of another overlay, so that QEMU
need not wait). `qemu-img` competes for the processors, so the floor without it is measured too. All
alternate in one run; only the ratios mean much.

Three points are measured, since QEMU sends its QMP greeting long before it has built the
machine: the greeting, the first command's answer, and the answer to `cont`, when the guest's
processors run. The library's figure is always that last point: entering `async with`.

    python benchmarks/launch.py [-n 20] [--image DISK.qcow2] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import io
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import Figure, Results, show
from benchmarks.floor import Points, launched
from smolvm_async import AcceleratorWarning, AsyncSmolVM
from smolvm_async.images import qcow2

IMPORT = """
import sys, time
before, began = len(sys.modules), time.perf_counter()
{statement}
print(time.perf_counter() - began, len(sys.modules) - before)
"""
# pydantic imports most of itself when the first model is made.
DEPENDENCIES = """import asyncio, anyio, anyio._backends._asyncio, pydantic, qemu.qmp
class Model(pydantic.BaseModel):
    number: int
"""
PROFILED = 10  # launches
FUNCTIONS = 15  # that are printed


def floor(image: Path, *, overlay: bool) -> Points:
    """Launch the same processes without the library, with `qemu-img` beside them or not."""
    with launched({"os": "windows", "image": image}, overlay=overlay) as (vm,):
        return vm.points


async def library(image: Path, data_dir: Path) -> float:
    """Return the seconds that entering `async with` takes."""
    vm = AsyncSmolVM(os="windows", image=image, data_dir=data_dir)
    began = time.perf_counter()
    await vm.start()
    launch = time.perf_counter() - began
    await vm.delete()
    return launch


async def own_time(image: Path, data_dir: Path) -> tuple[float, float]:
    """Return Python's processor seconds for a launch: of the loop's thread, of all threads."""
    vm = AsyncSmolVM(os="windows", image=image, data_dir=data_dir)
    thread, process = time.thread_time(), time.process_time()
    await vm.start()
    spent = time.thread_time() - thread, time.process_time() - process
    await vm.delete()
    return spent


async def stall(image: Path, data_dir: Path) -> float:
    """Return the loop's longest stall during a launch; watching takes a processor of its own."""
    vm = AsyncSmolVM(os="windows", image=image, data_dir=data_dir)
    watching = asyncio.ensure_future(longest_stall())
    await asyncio.sleep(0)
    await vm.start()
    watching.cancel()
    longest = await watching
    await vm.delete()
    return longest


async def longest_stall() -> float:
    """Record, until cancelled, the longest time between two turns of the event loop."""
    longest, last = 0.0, time.perf_counter()
    try:
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
    except asyncio.CancelledError:
        return longest


def profile(image: Path, data_dir: Path) -> list[str]:
    """Return the functions in which launches spend their time, as `cProfile` prints them."""
    profiler = cProfile.Profile(time.thread_time)  # waiting costs nothing on this clock

    async def launches() -> None:
        for _ in range(PROFILED):
            vm = AsyncSmolVM(os="windows", image=image, data_dir=data_dir)
            profiler.enable()
            await vm.start()
            profiler.disable()
            await vm.delete()

    asyncio.run(launches())
    output = io.StringIO()
    pstats.Stats(profiler, stream=output).strip_dirs().sort_stats("tottime").print_stats(FUNCTIONS)
    lines = [line.rstrip() for line in output.getvalue().splitlines() if line.strip()]
    head = f"cProfile of {PROFILED} launches, processor time of the event loop's thread:"
    begin = next(number for number, line in enumerate(lines) if "ncalls" in line)
    return [head, *lines[begin:]]


def import_cost(statement: str = "import smolvm_async") -> tuple[float, int]:
    """Return the seconds and the modules that an import costs a new interpreter."""
    command = [sys.executable, "-c", IMPORT.format(statement=statement)]
    # A package that pip installs has its bytecode beside it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, check=True, env=env)
    seconds, modules = done.stdout.split()
    return float(seconds), int(modules)


def measure_import(count: int) -> Results:
    """Measure the import of the library and of its dependencies alone, in turns."""
    results = Results("Import")
    pairs = [(import_cost(), import_cost(DEPENDENCIES)) for _ in range(count + 1)][1:]
    results.compare(
        "import; the floor is its dependencies alone",
        Figure("its dependencies alone", [theirs for _, (theirs, _) in pairs]),
        Figure("import smolvm_async", [ours for (ours, _), _ in pairs]),
    )
    results.add("modules that it imports", [pairs[0][0][1]], "")
    results.add("modules of its dependencies alone", [pairs[0][1][1]], "")
    return results


def measure(image: Path, count: int) -> Results:
    """Measure `count` rounds of launches."""
    floors: list[Points] = []
    bares: list[Points] = []
    launches: list[float] = []
    stalls: list[float] = []
    own: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        data_dir = Path(name)
        for round_ in range(count + 1):
            gc.collect()
            takes: list[Callable[[], None]] = [
                lambda: floors.append(floor(image, overlay=True)),
                lambda: launches.append(runner.run(library(image, data_dir))),
                lambda: bares.append(floor(image, overlay=False)),
                lambda: own.append(runner.run(own_time(image, data_dir))),
                lambda: stalls.append(runner.run(stall(image, data_dir))),
            ]
            turn = round_ % len(takes)  # no variant always follows the same other variant
            for take in [*takes[turn:], *takes[:turn]]:
                take()
        for values in (floors, bares, launches, own, stalls):
            del values[0]  # the first round warms the page cache
        profiled = profile(image, data_dir)
    results = Results("Launch of one VM (Windows class: OVMF with Secure Boot, TPM)")
    ours = Figure("entering async with, until its processors run", launches)
    points = {
        "one VM, to the first QMP answer": ("first QMP answer", [p.first_answer for p in floors]),
        "one VM, to running processors": ("running processors", [p.running for p in floors]),
        "one VM, without qemu-img beside the floor": (
            "first QMP answer, without qemu-img",
            [p.first_answer for p in bares],
        ),
        "one VM, to the QMP greeting": ("QMP greeting", [p.greeting for p in floors]),
    }
    for name, (what, values) in points.items():
        results.compare(name, Figure(what, values), ours, headline="greeting" not in name)
    thread, process = zip(*own, strict=True)
    results.add("Python's own processor time for one launch", process, headline=True)
    results.add("of it, in the event loop's thread", thread)
    results.add("longest stall of the event loop in a launch", stalls, headline=True)
    results.notes += profiled
    return results


def blank(directory: Path) -> Path:
    """Make an empty image of 64 GiB."""
    image = directory / "empty.qcow2"
    image.write_bytes(qcow2.empty(64 << 30))
    return image


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=20, help="rounds (default 20)")
    parser.add_argument("--image", type=Path, help="a qcow2; by default an empty one of 64 GiB")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", AcceleratorWarning)
    with tempfile.TemporaryDirectory() as directory:
        image = (arguments.image or blank(Path(directory))).absolute()
        found = [measure(image, arguments.n).to_json(), measure_import(arguments.n).to_json()]
    for results in found:
        if arguments.json:
            print(json.dumps(results, indent=1))
        else:
            show(results)


if __name__ == "__main__":
    main()
