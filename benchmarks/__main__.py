"""Every benchmark, one after another: tables, JSON, plots, and the tables of the READMEs.

    python -m benchmarks [--only launch,fleet] [--rounds 10] [--out DIR] [--readme]

Results that are not measured again stay in the JSON, with their own machine and date.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

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
from benchmarks.figures import Results, machine, show
from benchmarks.readme import quoted, rewritten, table
from smolvm_async import AcceleratorWarning

HERE = Path(__file__).parent
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


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="names, with commas between them")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables of the READMEs")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    warnings.simplefilter("ignore", AcceleratorWarning)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        known = benchmarks(launch.blank(Path(directory)), options.rounds)
        names = options.only.split(",") if options.only else list(known)
        if unknown := set(names) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        found = _measure(options.out / "results.json", known, names)
    from benchmarks.plots import draw  # here, since matplotlib would be in the memory of all forks

    written = [options.out / "results.json", *draw(found, options.out)]
    if options.readme:
        for readme, new in {HERE: table, HERE.parent: quoted}.items():
            path = readme / "README.md"
            path.write_text(rewritten(path.read_text(), new(found)))
            written.append(path)
    for path in written:
        print(f"written: {path}")


def _measure(
    path: Path, known: Mapping[str, Callable[[], Results]], names: list[str]
) -> dict[str, Any]:
    """Run the named benchmarks; write each result as soon as it is there."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found["machine"] = machine()
    earlier = found.get("benchmarks", {})
    console = Console(width=150)
    for name in names:
        console.rule(name)
        here = machine()
        earlier[name] = {**known[name]().to_json(), "machine": here}
        show(earlier[name], console)
        found["benchmarks"] = {name: earlier[name] for name in known if name in earlier}
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
