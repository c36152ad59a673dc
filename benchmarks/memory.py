"""Proportional set size (PSS) of processes, from `/proc/PID/smaps_rollup`.

Python's own memory for each VM is the growth of a new interpreter from one VM to many: an
interpreter that had as many VMs before would have the memory already.

    python -m benchmarks.memory windows 2048 IMAGE 16    # prints MiB for each of 15 more VMs
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from smolvm_async import AsyncSmolVM


def pss(pid: int, kind: str = "Pss") -> float:
    """Return the MiB of a process: its own pages and its share of shared pages.

    Args:
        kind: `Pss_Anon` leaves files out, such as libraries: of these a process's share gets
            smaller when others map them too, as QEMU does.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(rf"(?m)^{kind}: +(\d+) kB$", text)
    assert found is not None, text
    return int(found[1]) / 1024


def python_growth(kind: str, memory: int, image: Path, size: int) -> float:
    """Return the MiB by which a new interpreter grows with each of `size` VMs."""
    argv = [sys.executable, "-m", "benchmarks.memory", kind, str(memory), str(image), str(size)]
    root = Path(__file__).parents[1]
    return float(subprocess.run(argv, cwd=root, capture_output=True, check=True).stdout)


async def _with(size: int, kind: str, memory: int, image: Path, data_dir: Path) -> float:
    """Return the MiB of this process while so many VMs run."""
    arguments: dict[str, Any] = {"os": kind, "memory": memory, "image": image, "accel": "tcg"}
    vms = [AsyncSmolVM(**arguments, data_dir=data_dir) for _ in range(size)]
    try:
        await asyncio.gather(*(vm.start() for vm in vms))
        gc.collect()
        return pss(os.getpid(), "Pss_Anon")
    finally:
        await asyncio.gather(*(vm.delete() for vm in vms))


async def _growth(kind: str, memory: int, image: Path, size: int) -> float:
    with tempfile.TemporaryDirectory() as name:
        one = await _with(1, kind, memory, image, Path(name))
        return (await _with(size, kind, memory, image, Path(name)) - one) / (size - 1)


if __name__ == "__main__":
    kind, memory, image, size = sys.argv[1:]
    print(asyncio.run(_growth(kind, int(memory), Path(image), int(size))))
