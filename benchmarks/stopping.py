"""Stopping and deleting, against a bare QEMU that is told to `quit`.

python benchmarks/stopping.py [-n 10] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks.figures import Figure, Results, show
from benchmarks.floor import launched
from benchmarks.launch import blank
from smolvm_async import AcceleratorWarning, AsyncSmolVM


def bare_quit(image: Path) -> float:
    """Return the seconds from `quit` until a bare QEMU and its swtpm have ended."""
    with launched({"os": "windows", "image": image}) as (vm,):
        began = time.perf_counter()
        vm.monitor.send(json.dumps({"execute": "quit"}).encode())
        for pid in vm.pids.values():
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return time.perf_counter() - began


async def stop(image: Path, data_dir: Path) -> tuple[float, float]:
    """Stop without waiting for the guest, then delete; return the seconds of each."""
    vm = AsyncSmolVM(os="windows", image=image, data_dir=data_dir)
    await vm.start()
    began = time.perf_counter()
    await vm.stop(timeout=0)
    middle = time.perf_counter()
    await vm.delete()
    return middle - began, time.perf_counter() - middle


async def delete(image: Path, data_dir: Path) -> float:
    """Delete a running VM; return the seconds."""
    vm = AsyncSmolVM(os="windows", image=image, data_dir=data_dir)
    await vm.start()
    began = time.perf_counter()
    await vm.delete()
    return time.perf_counter() - began


def measure(image: Path, count: int) -> Results:
    """Measure all, in turns."""
    bares, stops, afters, deletes = [], [], [], []
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as runner:
        for _ in range(count):
            bares.append(bare_quit(image))
            stopped, after = runner.run(stop(image, Path(name)))
            stops.append(stopped)
            afters.append(after)
            deletes.append(runner.run(delete(image, Path(name))))
    results = Results("Stop and delete (Windows class)")
    quitting = Figure("QMP quit, until both processes have ended", bares)
    results.compare("stop, by quit", quitting, Figure("stop(timeout=0)", stops))
    results.add("delete() of a running VM (SIGKILL, directory removed)", deletes, headline=True)
    results.add("delete() after stop()", afters)
    results.notes.append(
        "The library's stop() ends when QEMU and swtpm are reaped and the TPM's state is removed; "
        "a guest's own shutdown takes what the guest takes."
    )
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=10, help="rounds (default 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore", AcceleratorWarning)
    with tempfile.TemporaryDirectory() as directory:
        results = measure(blank(Path(directory)), options.n).to_json()
    print(json.dumps(results, indent=1)) if options.json else show(results)


if __name__ == "__main__":
    main()
