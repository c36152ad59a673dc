"""The tables of the READMEs, from the JSON: between two marks, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.figures import shown

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


# The rows that the top-level README quotes.
QUOTED = (
    "one VM, to running processors",
    "warm start of the built-in Linux, to the first command's answer; the floor is a cold boot",
    "16 fresh sandboxes, each answered one command; the floor boots them",
)


def rewritten(readme: str, new: str) -> str:
    """Return a README with `new` between the marks.

    Raises:
        ValueError: The README does not have each mark once, in their order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"a README must have {BEGIN} and then {END}, each once")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


HEAD = [
    "| | floor | library | of the medians | round by round (quartiles) | budget |",
    "|---|---|---|---|---|---|",
]


def quoted(found: Mapping[str, Any]) -> str:
    """Return the rows that the top-level README quotes, as Markdown."""
    rows = [row for results in found["benchmarks"].values() for row in _rows(results)]
    wanted = (row for name in QUOTED for row in rows if row.startswith(f"| {name} |"))
    return "\n".join([*HEAD, *wanted])


def table(found: Mapping[str, Any]) -> str:
    """Return the headlines, as Markdown; then the machine."""
    lines = list(HEAD)
    for results in found["benchmarks"].values():
        lines += _rows(results)
    machine = found["machine"]
    where = (
        f"{machine['qemu'].removeprefix('QEMU emulator ')}, {machine['accelerator'].upper()}, "
        f"{machine['processors']} processors, {machine['date'][:10]}. Floor and "
        "library are medians. The other columns are library / floor; a budget of a single figure "
        "has that figure's unit."
    )
    lines += ["", f"QEMU {where}"]
    if peers := found["benchmarks"].get("peers"):
        lines += ["", *_peers(peers)]
    return "\n".join(lines)


def _rows(results: Mapping[str, Any]) -> Iterator[str]:
    for comparison in results["comparisons"]:
        if comparison["headline"]:
            ratio = comparison["ratio"]
            low, high = ratio["quartiles"]
            spread = f" ({low:.2f} to {high:.2f})" if ratio["rounds"] > 1 else ""
            cells = [_cell(comparison[part]) for part in ("floor", "library")]
            cells += [f"{comparison['ratio_of_medians']:.2f}", f"{ratio['median']:.2f}{spread}"]
            cells.append(_budget(comparison))
            yield f"| {comparison['name']} | {' | '.join(cells)} |"
    for figure in results["figures"]:
        if figure["headline"]:
            budget = _budget(figure, figure["unit"])
            yield f"| {figure['name']} | | {_cell(figure)} | | | {budget} |"


def _budget(found: Mapping[str, Any], unit: str = "") -> str:
    budget = found.get("budget")
    return "" if budget is None else f"{budget:g} {unit}".strip()


def _cell(figure: Mapping[str, Any]) -> str:
    return f"{shown(figure['median'])} {figure['unit']}".strip()


def _peers(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table with a column for each measured thing and a row for each peer."""
    cells: dict[str, dict[str, str]] = {}
    for figure in results["figures"]:
        peer, _, what = figure["name"].partition(": ")
        cells.setdefault(peer, {})[what] = _cell(figure)
    columns = list(next(iter(cells.values()), {}))
    yield f"| {results['title']} | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for peer, values in cells.items():
        yield f"| {peer} | {' | '.join(values.get(column, '') for column in columns)} |"
    if results["notes"]:
        yield ""
        for note in results["notes"]:
            yield f"- {note}"
