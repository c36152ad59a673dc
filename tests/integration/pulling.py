"""Pull an image, and print the time and memory it took: `python -m tests.integration.pulling`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from smolvm_async import ImageStore, SmolVMError


async def watch(gaps: list[tuple[float, float]]) -> None:
    """Note the gaps between the loop's turns: in wall time, and in time that this thread worked."""
    wall, work = time.perf_counter(), time.thread_time()
    while True:
        await asyncio.sleep(0.001)
        now, worked = time.perf_counter(), time.thread_time()
        gaps.append((now - wall - 0.001, worked - work))
        wall, work = now, worked


def memory(name: str) -> int:
    """This process's memory in KiB: `VmRSS` now, `VmHWM` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError


async def main(uri: str, root: str, times: int) -> None:
    """Pull an image in as many tasks at once as `times` says."""
    gaps: list[tuple[float, float]] = []
    watching = asyncio.create_task(watch(gaps))
    before, began = memory("VmRSS"), time.monotonic()
    result: dict[str, object] = {}
    try:
        pulls = [ImageStore(root).pull(uri) for _ in range(times)]
        result["disks"] = sorted({str(image.disk) for image in await asyncio.gather(*pulls)})
    except SmolVMError as error:
        result["error"] = f"{type(error).__name__}: {error}"
    watching.cancel()
    result |= {
        "seconds": time.monotonic() - began,
        "before_kib": before,
        "peak_kib": memory("VmHWM"),
        "longest_gap": max(gap for gap, _ in gaps),
        "longest_work": max(work for _, work in gaps),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1))
