"""Every benchmark, by its name."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import (
    agent,
    clones,
    comparable,
    desktop,
    fleet,
    launch,
    linux,
    network,
    sandboxes,
    stopping,
)
from benchmarks.figures import Results
from smolvm_async import AcceleratorWarning

LIMITS = (1, 2, 4, 8, 16)  # of max_booting=


def benchmarks(image: Path, rounds: int) -> Mapping[str, Callable[[], Results]]:
    """Return all benchmarks by name; the slow ones get fewer rounds."""
    some, few = max(1, rounds // 2), max(1, rounds // 4)
    return {
        "launch": partial(launch.measure, image, 2 * rounds),
        "fleet": partial(fleet.measure, image, some, fleet.SIZES),
        "max_booting": partial(fleet.measure_max_booting, image, few, LIMITS),
        "stopping": partial(stopping.measure, image, rounds),
        "boot": lambda: asyncio.run(linux.measure_boot(some)),
        "sandboxes": lambda: asyncio.run(sandboxes.measure(few)),
        "clones": partial(clones.measure, some),
        "network": lambda: asyncio.run(network.measure(some)),
        "command": lambda: asyncio.run(linux.measure_commands(5 * rounds)),
        "agent": lambda: asyncio.run(agent.measure(5 * rounds)),
        "screenshot": lambda: asyncio.run(desktop.measure(image, 5 * rounds, "1920x1080")),
        "import": partial(launch.measure_import, rounds),
        "peers": partial(comparable.measure, few),
    }


def run_apart(image: Path, rounds: int, name: str) -> dict[str, Any]:
    """Run a benchmark in a process of its own: what another has left in memory slows none down."""
    with ProcessPoolExecutor(1, get_context("spawn")) as processes:
        return processes.submit(_run, image, rounds, name).result()


def _run(image: Path, rounds: int, name: str) -> dict[str, Any]:
    warnings.simplefilter("ignore", AcceleratorWarning)
    return benchmarks(image, rounds)[name]().to_json()
