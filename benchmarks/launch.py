"""Launch time against the floor, import time, and the event loop's longest stall.

The floor is what one pays without this library: QEMU and swtpm spawned bare and at once with
the same command lines, and an overlay made by `qemu-img create` beside them (one of its own, so
that QEMU need not wait for it). It competes for the processors, so the floor without it is
measured too. All alternate in one run; only the ratios mean much.

Three points are measured, since QEMU sends its QMP greeting long before it has built the
machine: the greeting, the first command's answer, and the answer to `cont`, when the guest's
processors run. The library's figure is always that last point: entering `async with`.

    python benchmarks/launch.py [-n 20] [--image DISK.qcow2] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolvm_async import AcceleratorWarning, AsyncSmolVM
from smolvm_async.config import VMConfig, make_config
from smolvm_async.host import HostTools, choose_accelerator, find_tools
from smolvm_async.images import qcow2
from smolvm_async.qemu.arguments import Descriptors, qemu_arguments
from smolvm_async.sidecars.swtpm import attach_arguments, swtpm_arguments
from smolvm_async.state import OVERLAY, TPM, VARS

IMPORT = """
import sys, time
before, began = len(sys.modules), time.perf_counter()
import smolvm_async
print(time.perf_counter() - began, len(sys.modules) - before)
"""


@dataclass(frozen=True)
class Floor:
    """Seconds from the first spawn to each point."""

    greeting: float
    first_answer: float
    running: float


def floor(config: VMConfig, tools: HostTools, image: Path, *, overlay: bool) -> Floor:
    """Launch the same processes without the library, with `qemu-img` beside them or not."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        assert tools.firmware is not None
        shutil.copy(tools.firmware.vars_template, directory / VARS)
        (directory / TPM).mkdir()
        base = stack.enter_context(image.open("rb"))
        (directory / OVERLAY).write_bytes(qcow2.empty(qcow2.check(base.fileno()).virtual_size))
        ours, monitor, _, console, swtpm_end, tpm = (
            stack.enter_context(end) for _ in range(3) for end in socket.socketpair()
        )
        memory = os.memfd_create("screen")
        stack.callback(os.close, memory)
        screen = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY)
        stack.callback(os.close, screen)
        swtpm_line = swtpm_arguments(tools, swtpm_end.fileno())
        qemu_line = qemu_arguments(
            config,
            tools,
            choose_accelerator(config.accel)[0],
            Descriptors(monitor.fileno(), console.fileno(), base.fileno(), screen),
            attach_arguments(tpm.fileno()),
        )
        fds = [base.fileno(), monitor.fileno(), console.fileno(), tpm.fileno(), screen]
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image)]

        began = time.perf_counter()
        qemu = subprocess.Popen(qemu_line, cwd=directory, pass_fds=fds)
        stack.callback(end, qemu)
        swtpm = subprocess.Popen(swtpm_line, cwd=directory, pass_fds=[swtpm_end.fileno()])
        stack.callback(end, swtpm)
        making = subprocess.Popen(
            [*create, str(directory / "beside.qcow2")] if overlay else ["true"]
        )
        stack.callback(end, making)
        monitor.close()
        stream = stack.enter_context(ours.makefile("rwb", buffering=0))
        stream.readline()
        making.wait()
        greeting = time.perf_counter() - began
        execute(stream, "qmp_capabilities")
        first_answer = time.perf_counter() - began
        execute(stream, "cont")
        return Floor(greeting, first_answer, time.perf_counter() - began)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill and reap."""
    process.kill()
    process.wait()


def execute(stream: Any, command: str) -> None:
    """Send a QMP command and wait for its answer."""
    stream.write(json.dumps({"execute": command}).encode())
    while "return" not in json.loads(stream.readline()):
        pass


async def library(image: Path, data_dir: Path) -> float:
    """Seconds to enter `async with`."""
    vm = AsyncSmolVM(os="windows", image=image, data_dir=data_dir)
    began = time.perf_counter()
    await vm.start()
    launch = time.perf_counter() - began
    await vm.delete()
    return launch


async def stall(image: Path, data_dir: Path) -> float:
    """The loop's longest stall during a launch; watching it takes a processor of its own."""
    vm = AsyncSmolVM(os="windows", image=image, data_dir=data_dir)
    watching = asyncio.ensure_future(longest_stall())
    await asyncio.sleep(0)
    await vm.start()
    watching.cancel()
    longest = await watching
    await vm.delete()
    return longest


async def longest_stall() -> float:
    """Until cancelled: the longest time between two turns of the event loop."""
    longest, last = 0.0, time.perf_counter()
    try:
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
    except asyncio.CancelledError:
        return longest


def import_cost() -> tuple[float, int]:
    """Seconds and modules that `import smolvm_async` costs a new interpreter."""
    output = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout
    seconds, modules = output.split()
    return float(seconds), int(modules)


def measure(image: Path, count: int) -> dict[str, float]:
    """Medians over `count` rounds, in milliseconds, and the ratios of the medians."""
    config = make_config(os="windows", image=image)
    tools = find_tools(config.profile)
    floors: list[Floor] = []
    bares: list[Floor] = []
    launches: list[float] = []
    stalls: list[float] = []
    imports: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as data_dir, asyncio.Runner() as runner:
        for round_ in range(count + 1):
            with_overlay = floor(config, tools, image, overlay=True)
            bare = floor(config, tools, image, overlay=False)
            launched = runner.run(library(image, Path(data_dir)))
            stalled = runner.run(stall(image, Path(data_dir)))
            if round_:  # the first one warms the page cache
                floors.append(with_overlay)
                bares.append(bare)
                launches.append(launched)
                stalls.append(stalled)
                imports.append(import_cost())
    launch = statistics.median(launches)
    greeting = statistics.median(point.greeting for point in floors)
    first_answer = statistics.median(point.first_answer for point in floors)
    running = statistics.median(point.running for point in floors)
    without = statistics.median(point.first_answer for point in bares)
    return {
        "floor, to the QMP greeting (ms)": greeting * 1e3,
        "floor, to the first answer (ms)": first_answer * 1e3,
        "floor, to running processors (ms)": running * 1e3,
        "without qemu-img, to the first answer (ms)": without * 1e3,
        "library, to running processors (ms)": launch * 1e3,
        "library / floor to the greeting": launch / greeting,
        "library / floor to the first answer": launch / first_answer,
        "library / the same without qemu-img": launch / without,
        "library / floor to running processors": launch / running,
        "longest stall of the event loop, median (ms)": statistics.median(stalls) * 1e3,
        "longest stall of the event loop, worst (ms)": max(stalls) * 1e3,
        "import smolvm_async, median (ms)": statistics.median(s for s, _ in imports) * 1e3,
        "modules that it imports": imports[0][1],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=20, help="rounds (default 20)")
    parser.add_argument("--image", type=Path, help="a qcow2; by default an empty one of 64 GiB")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", AcceleratorWarning)
    with tempfile.TemporaryDirectory() as directory:
        image = arguments.image or Path(directory) / "empty.qcow2"
        if arguments.image is None:
            image.write_bytes(qcow2.empty(64 << 30))
        figures = measure(image.absolute(), arguments.n)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    accelerator, warning = choose_accelerator("auto")
    print(f"accelerator: {accelerator.name}. {warning or ''}")
    for name, value in figures.items():
        print(f"{name:<46}{value:>10.2f}")


if __name__ == "__main__":
    main()
