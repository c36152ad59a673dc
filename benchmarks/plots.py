"""Plots of the JSON, one file for each benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

plt.switch_backend("Agg")  # files only


def draw(found: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draw a plot for each benchmark; return the files."""
    drawn = []
    for name, results in found["benchmarks"].items():
        figures = [figure for figure in results["figures"] if figure["unit"] in ("s", "ms")]
        path = directory / f"{name}.svg"
        if results["comparisons"]:
            _comparisons(results, path)
        elif figures:
            _figures(results["title"], figures, path)
        else:
            continue
        drawn.append(path)
    return drawn


def _comparisons(results: Mapping[str, Any], path: Path) -> None:
    """Draw floor and library side by side, with quartiles and their ratio."""
    comparisons = results["comparisons"]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.6 * len(comparisons)))
    for number, part in enumerate(("floor", "library")):
        figures = [comparison[part] for comparison in comparisons]
        places = [index + (number - 0.5) * 0.38 for index in range(len(figures))]
        axes.barh(places, _medians(figures), 0.36, xerr=_errors(figures), label=part)
    for index, comparison in enumerate(comparisons):
        widest = max(comparison[part]["quartiles"][1] for part in ("floor", "library"))
        axes.annotate(f"  {comparison['ratio']['median']:.2f}", (widest, index), va="center")
    axes.set_yticks(range(len(comparisons)), [comparison["name"] for comparison in comparisons])
    axes.set_xlabel(f"{comparisons[0]['floor']['unit']}; the number is library / floor")
    axes.legend()
    _save(figure, axes, results["title"], path)


def _figures(title: str, figures: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(figures)))
    names = [f"{figure['name']} ({figure['unit']})" for figure in figures]
    axes.barh(range(len(figures)), _medians(figures), xerr=_errors(figures))
    axes.set_yticks(range(len(figures)), names)
    axes.set_xscale("log")
    _save(figure, axes, title, path)


def _medians(figures: Sequence[Mapping[str, Any]]) -> list[float]:
    return [figure["median"] for figure in figures]


def _errors(figures: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return the distances of the quartiles from the medians, as matplotlib takes them."""
    low = [max(0.0, figure["median"] - figure["quartiles"][0]) for figure in figures]
    high = [max(0.0, figure["quartiles"][1] - figure["median"]) for figure in figures]
    return [low, high]


def _save(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.set_title(title)
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
