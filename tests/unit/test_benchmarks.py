"""The benchmarks' figures, and the README's table that is made of them."""

from __future__ import annotations

import pytest

from benchmarks.figures import Comparison, Figure, Results
from benchmarks.readme import BEGIN, END, rewritten

MACHINE = {
    "qemu": "QEMU emulator version 7.2.22",
    "accelerator": "tcg",
    "processors": 2,
    "date": "2026-11-26T18:00:00",
}


def found() -> dict[str, object]:
    results = Results("Launch")
    floor, library = Figure("bare", [0.030, 0.040, 0.050]), Figure("ours", [0.033, 0.048, 0.060])
    results.comparisons.append(Comparison("until the processors run", floor, library))
    results.figures.append(Figure("import", [0.1], headline=True))
    results.figures.append(Figure("not shown", [0.2]))
    return {"machine": MACHINE, "benchmarks": {"launch": results.to_json()}}


def test_the_ratio_is_taken_round_by_round() -> None:
    comparison = Comparison("x", Figure("a", [1.0, 2.0, 4.0]), Figure("b", [2.0, 2.0, 12.0]))
    assert list(comparison.ratio.values) == [2.0, 1.0, 3.0]
    assert comparison.ratio.median == 2.0


def test_the_table_is_put_between_the_marks_and_nothing_else_is_touched() -> None:
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = rewritten(readme, found())
    assert once.startswith(f"before\n{BEGIN}\n| | floor | library |")
    assert once.endswith(f"{END}\nafter\n")
    assert "| until the processors run | 40.0 ms | 48.0 ms | 1.20 (1.15 to 1.20) |" in once
    assert "| import | | 100 ms | |" in once
    assert "not shown" not in once
    assert "old" not in once
    assert rewritten(once, found()) == once


@pytest.mark.parametrize("readme", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_its_marks_is_refused(readme: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        rewritten(readme, found())
