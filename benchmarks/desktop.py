"""The desktop's figures: screenshots against QEMU's bare `screendump`, waiting, the loop's stalls.

Measured on the firmware's screen of a VM with an empty disk. Bare QEMU and the library alternate in
one run; only the ratios mean much.

    python benchmarks/desktop.py [-n 50] [--resolution 1920x1080] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import tempfile
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Results, show
from smolvm_async import AcceleratorWarning, AsyncSmolVM, VMTimeoutError

DRAWN = 3.0  # seconds without a change: the firmware has found nothing to boot
TICK = 0.001  # seconds between two looks at how late the event loop is
WATCHED = 5.0  # seconds of wait_for_screen()


@asynccontextmanager
async def stalls() -> AsyncIterator[list[float]]:
    """Yield a list of the event loop's delays, in seconds, one for each tick."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            late.append(time.perf_counter() - due)

    ticking = asyncio.create_task(tick())
    try:
        yield late
    finally:
        ticking.cancel()


async def timed(work: Any) -> float:
    """Return the seconds that an awaitable takes."""
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def measure(image: Path, rounds: int, resolution: str) -> Results:
    """Measure all figures."""
    results = Results(f"Screenshots of the firmware's screen, {resolution}, and waiting")
    async with AsyncSmolVM(os="windows", image=image, resolution=resolution, accel="tcg") as vm:
        picture = await vm.wait_for_screen(changed=True, stable=DRAWN)
        run: Any = vm._vm.run

        def bare(image_format: str) -> Any:
            arguments = {"filename": "bare", "format": image_format}
            return run._monitor.execute("screendump", arguments)

        triples = [
            (await timed(bare("png")), await timed(vm.screenshot()), await timed(bare("ppm")))
            for _ in range(rounds)
        ]
        png, ours, ppm = zip(*triples, strict=True)
        results.compare(
            f"screenshot of the firmware, {picture.width}x{picture.height}, while it runs",
            Figure("QMP screendump, PNG", png),
            Figure("screenshot()", ours),
        )
        results.add("QMP screendump, PPM", ppm)
        for name, wait in (("idle", asyncio.sleep(WATCHED)), ("waiting", watch(vm))):
            async with stalls() as late:
                await wait
            results.add(f"the loop's worst stall, {name}", [max(late)])
            percentile = sorted(late)[int(len(late) * 0.99)]
            results.add(f"99th percentile of the loop's stalls, {name}", [percentile])
        await vm.stop(timeout=0)
    return results


async def watch(vm: AsyncSmolVM) -> None:
    """Wait for a screen that never comes: each picture is compared with two others, as a whole."""
    shown = await vm.screenshot()
    with suppress(VMTimeoutError):
        await vm.wait_for_screen(changed=shown, stable=1e6, timeout=WATCHED)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", "--rounds", type=int, default=50)
    parser.add_argument("--resolution", default="1920x1080")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", AcceleratorWarning)
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "empty.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
        results = asyncio.run(measure(image, options.rounds, options.resolution))
    found = results.to_json()
    print(json.dumps(found, indent=1)) if options.json else show(found)


if __name__ == "__main__":
    main()
