"""Figures: the measured values of all rounds, their median and spread, and comparisons."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from smolvm_async.host.tools import choose_accelerator

UNITS: Mapping[str, float] = {"ms": 1e3, "s": 1, "MiB": 1, "KiB": 1, "": 1}  # of what is kept


@dataclass(frozen=True)
class Figure:
    """One measured thing.

    Attributes:
        values: One of each round; times are in seconds.
        unit: The unit in which it is shown.
        headline: Whether the READMEs show it.
        budget: The most that the median is to be, in the figure's unit; `None` if there is none.
    """

    name: str
    values: Sequence[float]
    unit: str = "ms"
    headline: bool = False
    budget: float | None = None

    @property
    def median(self) -> float:
        """The median, in the figure's unit."""
        return statistics.median(self.values) * UNITS[self.unit]

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles, in the figure's unit."""
        low, high = quartiles(self.values)
        return low * UNITS[self.unit], high * UNITS[self.unit]

    def to_json(self) -> dict[str, Any]:
        """Return the figure as JSON, in its unit."""
        values = [value * UNITS[self.unit] for value in self.values]
        return {
            "name": self.name,
            "unit": self.unit,
            "headline": self.headline,
            "budget": self.budget,
            "median": self.median,
            "quartiles": self.spread,
            "rounds": len(values),
            "values": values,
        }


@dataclass(frozen=True)
class Comparison:
    """The library against the same work without the library, measured in turns.

    Attributes:
        budget: The most that library / floor, round by round, is to be; `None` if there is none.
    """

    name: str
    floor: Figure
    library: Figure
    headline: bool = True
    budget: float | None = None

    @property
    def ratio(self) -> Figure:
        """The ratio round by round: other load of the machine then weighs on both."""
        pairs = zip(self.library.values, self.floor.values, strict=True)
        return Figure(f"{self.name}: library / floor", [ours / bare for ours, bare in pairs], "")

    def to_json(self) -> dict[str, Any]:
        """Return the three figures as JSON."""
        figures = {"floor": self.floor, "library": self.library, "ratio": self.ratio}
        shown = {name: figure.to_json() for name, figure in figures.items()}
        medians = self.library.median / self.floor.median
        return {
            "name": self.name,
            "headline": self.headline,
            "budget": self.budget,
            "ratio_of_medians": medians,
            **shown,
        }


@dataclass
class Results:
    """The results of one benchmark."""

    title: str
    comparisons: list[Comparison] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(
        self,
        name: str,
        floor: Figure,
        library: Figure,
        *,
        headline: bool = True,
        budget: float | None = None,
    ) -> None:
        """Add a comparison."""
        self.comparisons.append(Comparison(name, floor, library, headline, budget))

    def add(
        self,
        name: str,
        values: Sequence[float],
        unit: str = "ms",
        *,
        headline: bool = False,
        budget: float | None = None,
    ) -> None:
        """Add a figure."""
        self.figures.append(Figure(name, values, unit, headline, budget))

    def to_json(self) -> dict[str, Any]:
        """Return the results as JSON."""
        return {
            "title": self.title,
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "figures": [figure.to_json() for figure in self.figures],
            "notes": self.notes,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the bounds of the middle half of the values; one value is both bounds."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def machine() -> dict[str, Any]:
    """Describe the machine."""
    version = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True)
    accelerator, _ = choose_accelerator("auto")
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) // 1024
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processors": len(os.sched_getaffinity(0)),
        "memory_mib": memory,
        "load_before": os.getloadavg(),
        "accelerator": accelerator.name,
        "qemu": version.stdout.partition("\n")[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def shown(number: float) -> str:
    """Format a number with three significant digits."""
    if abs(number) >= 100:
        return f"{number:.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"


def show(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the JSON of one benchmark as a table."""
    table = Table(title=results["title"], title_justify="left")
    table.add_column("")
    for name in ("median", "quartiles", "unit", "rounds", "budget"):
        table.add_column(name, justify="right")
    for comparison in results["comparisons"]:
        for part in ("floor", "library", "ratio"):
            figure = comparison[part]
            name = "ratio, round by round" if part == "ratio" else figure["name"]
            budget = comparison["budget"] if part == "ratio" else figure["budget"]
            _add_row(table, f"{comparison['name']} | {name}", {**figure, "budget": budget})
        ratio = shown(comparison["ratio_of_medians"])
        table.add_row(f"{comparison['name']} | ratio of the medians", ratio, "", "", "", "")
        table.add_section()
    for figure in results["figures"]:
        _add_row(table, figure["name"], figure)
    console = console or Console(width=140)
    console.print(table)
    for note in results["notes"]:
        console.print(note, markup=False, highlight=False)


def _add_row(table: Table, name: str, figure: Mapping[str, Any]) -> None:
    low, high = figure["quartiles"]
    spread = f"{shown(low)} to {shown(high)}"
    budget = "" if figure["budget"] is None else f"{figure['budget']:g}"
    cells = (shown(figure["median"]), spread, figure["unit"], str(figure["rounds"]), budget)
    table.add_row(name, *cells)
