"""Every benchmark, one after another: tables, JSON, plots, and the tables of the READMEs.

    python -m benchmarks [--only launch,fleet] [--rounds 10] [--out DIR] [--readme]

Results that are not measured again stay in the JSON, with their own machine and date.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import launch
from benchmarks.figures import machine, show
from benchmarks.plots import draw
from benchmarks.readme import quoted, rewritten, table
from benchmarks.suite import benchmarks, run_apart

HERE = Path(__file__).parent


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
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        image = launch.blank(Path(directory))
        known = [*benchmarks(image, options.rounds)]
        names = options.only.split(",") if options.only else known
        if unknown := set(names) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        run = partial(run_apart, image, options.rounds)
        found = _measure(options.out / "results.json", run, known, names)
    written = [options.out / "results.json", *draw(found, options.out)]
    if options.readme:
        for readme, new in {HERE: table, HERE.parent: quoted}.items():
            path = readme / "README.md"
            path.write_text(rewritten(path.read_text(), new(found)))
            written.append(path)
    for path in written:
        print(f"written: {path}")


def _measure(
    path: Path, run: Callable[[str], dict[str, Any]], known: list[str], names: list[str]
) -> dict[str, Any]:
    """Run the named benchmarks; write each result as soon as it is there."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found["machine"] = machine()
    earlier = found.get("benchmarks", {})
    console = Console(width=150)
    for name in names:
        console.rule(name)
        here = machine()
        earlier[name] = {**run(name), "machine": here}
        show(earlier[name], console)
        found["benchmarks"] = {name: earlier[name] for name in known if name in earlier}
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
