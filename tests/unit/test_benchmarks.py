"""The README's table of the benchmarks, its marks, and the times for which a guest stands still."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.clones import stood_still
from benchmarks.figures import Figure, Results, shown
from benchmarks.readme import BEGIN, END, QUOTED, quoted, rewritten, table
from smolvm_async.qemu.events import Event

MACHINE = {
    "qemu": "QEMU emulator version 7.2.22 (Debian)",
    "accelerator": "tcg",
    "processors": 2,
    "date": "2026-11-26T18:00:00+00:00",
}


def found() -> dict[str, Any]:
    """Return the results of one benchmark and of the peers."""
    launch = Results("Launch")
    floor, ours = Figure("bare", [0.040, 0.050, 0.060]), Figure("ours", [0.044, 0.045, 0.072])
    launch.compare("one VM", floor, ours, budget=1.3)
    launch.compare("one VM, to the greeting", floor, ours, headline=False)
    launch.add("memory", [12.5], "MiB", headline=True)
    launch.add("stall", [0.004], headline=True, budget=10)
    launch.add("unimportant", [1.0], "")
    peers = Results("Peers")
    peers.add("smolvm_async: to the first answer", [3.0, 5.0], "s")
    peers.add("smolvm_async: a command", [0.020, 0.020])
    peers.add("other: to the first answer", [7.0], "s")
    peers.notes.append("third cannot run here: no image")
    results = {"launch": launch.to_json(), "peers": peers.to_json()}
    return {"machine": MACHINE, "benchmarks": results}


@pytest.mark.parametrize(
    ("number", "text"), [(1234.5, "1234"), (45.67, "45.7"), (1.234, "1.23"), (0.0, "0.00")]
)
def test_three_digits_count(number: float, text: str) -> None:
    assert shown(number) == text


def test_the_table_has_the_headlines_and_the_peers() -> None:
    assert table(found()).splitlines() == [
        "| | floor | library | of the medians | round by round (quartiles) | budget |",
        "|---|---|---|---|---|---|",
        "| one VM | 50.0 ms | 45.0 ms | 0.90 | 1.10 (1.00 to 1.15) | 1.3 |",
        "| memory | | 12.5 MiB | | |  |",
        "| stall | | 4.00 ms | | | 10 ms |",
        "",
        "QEMU version 7.2.22 (Debian), TCG, 2 processors, 2026-11-26. Floor and library are "
        "medians. The other columns are library / floor; a budget of a single figure has that "
        "figure's unit.",
        "",
        "| Peers | to the first answer | a command |",
        "|---|---|---|",
        "| smolvm_async | 4.00 s | 20.0 ms |",
        "| other | 7.00 s |  |",
        "",
        "- third cannot run here: no image",
    ]


def test_results_from_before_there_were_budgets_stay_in_the_table() -> None:
    earlier = found()
    for row in (*(launch := earlier["benchmarks"]["launch"])["comparisons"], *launch["figures"]):
        del row["budget"]
    assert "| one VM | 50.0 ms | 45.0 ms | 0.90 | 1.10 (1.00 to 1.15) |  |" in table(earlier)


@pytest.mark.parametrize(
    ("names", "seconds"),
    [
        ((), 0.0),
        (("STOP", "RESUME"), 1.0),
        (("RESUME", "STOP", "MIGRATION", "STOP", "RESUME", "RESUME"), 3.0),
        (("STOP", "RESUME", "STOP", "RESUME"), 2.0),
        (("STOP",), 0.0),
    ],
)
def test_a_guest_stands_still_from_each_stop_to_the_next_resume(
    names: tuple[str, ...], seconds: float
) -> None:
    events = [Event(name, 100.0 + second) for second, name in enumerate(names)]
    assert stood_still(events) == seconds


def test_only_what_is_between_the_marks_is_rewritten() -> None:
    readme = f"before\n\n{BEGIN}\nold\n{END}\nafter\n"
    once = rewritten(readme, table(found()))
    assert once == f"before\n\n{BEGIN}\n{table(found())}\n{END}\nafter\n"
    assert rewritten(once, table(found())) == once


@pytest.mark.parametrize(
    "readme", ["", BEGIN, END, f"{END} {BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"]
)
def test_a_readme_without_both_marks_is_refused(readme: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        rewritten(readme, table(found()))


def test_the_readmes_tell_what_the_results_say() -> None:
    root = Path(__file__).parents[2]
    measured = json.loads((root / "benchmarks" / "results" / "results.json").read_text())
    for readme, rows in (("README.md", quoted), ("benchmarks/README.md", table)):
        text = (root / readme).read_text()
        assert rewritten(text, rows(measured)) == text, readme
    assert all(name in quoted(measured) for name in QUOTED)
