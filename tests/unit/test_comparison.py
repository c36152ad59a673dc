"""Comparisons against a slow and obvious one, and the arguments that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvm_async import ConfigError
from smolvm_async.controls.desktop.comparison import BAND, Box, Comparison, Region, check_region
from smolvm_async.controls.desktop.picture import Screenshot


def picture(width: int, height: int, pixels: bytes | None = None) -> Screenshot:
    header = f"P6\n{width} {height}\n255\n".encode()
    return Screenshot.from_ppm(header + (bytes(width * height * 3) if pixels is None else pixels))


def cut(screen: Screenshot, box: Box) -> Screenshot:
    left, top, width, height = box
    image = screen.image().crop((left, top, left + width, top + height))
    return picture(width, height, image.tobytes())


def share_different(
    one: Screenshot, other: Screenshot, region: Box, ignore: Sequence[Box], tolerance: int
) -> float | None:
    """The oracle: every pixel of its own; `None` if there is nothing to look at."""
    verdicts = []
    left, top, width, height = region
    for y in range(top, top + height):
        for x in range(left, left + width):
            if not any(a <= x < a + w and b <= y < b + h for a, b, w, h in ignore):
                at = (y * one.width + x) * 3
                pair = zip(one.pixels[at : at + 3], other.pixels[at : at + 3], strict=True)
                verdicts.append(any(abs(a - b) > tolerance for a, b in pair))
    return sum(verdicts) / len(verdicts) if verdicts else None


@st.composite
def cases(draw: st.DrawFn) -> tuple[Screenshot, Screenshot, Box, list[Box]]:
    """Two pictures of a size, the second with some bytes changed; a region; what is ignored."""
    width, height = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    size = width * height * 3
    before = draw(st.binary(min_size=size, max_size=size))
    after = bytearray(before)
    changes = st.tuples(st.integers(0, size - 1), st.integers(0, 255))
    for at, value in draw(st.lists(changes, max_size=12)):
        after[at] = value

    def box() -> Box:
        left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
        return left, top, right - left, bottom - top

    ignore = [box() for _ in range(draw(st.integers(0, 4)))]
    region = draw(st.just((0, 0, width, height))) if draw(st.booleans()) else box()
    return picture(width, height, before), picture(width, height, bytes(after)), region, ignore


TOLERANCES = st.integers(0, 255) | st.just(0)
SHARES = st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.25, 0.29, 0.5, 1 / 3, 1.0])


@settings(max_examples=1000)
@given(cases(), TOLERANCES, SHARES)
def test_it_agrees_with_the_oracle(
    case: tuple[Screenshot, Screenshot, Box, list[Box]], tolerance: int, max_different: float
) -> None:
    one, other, region, ignore = case
    comparison = Comparison(
        region=region, ignore=ignore, tolerance=tolerance, max_different=max_different
    )
    share = share_different(one, other, region, ignore, tolerance)
    if share is None:
        with pytest.raises(ConfigError, match="ignore= covers the whole region"):
            comparison.differs(one, other)
        return
    assert comparison.differs(one, other) == (share > max_different)
    assert comparison.differs(other, one) == (share > max_different)
    assert comparison.matches(one, other) == (share <= max_different)
    assert comparison.matches(one, cut(other, region)) == (share <= max_different)
    parts = comparison.parts(*one.size)
    seen = [(x, y) for a, b, w, h in parts for x in range(a, a + w) for y in range(b, b + h)]
    assert len(seen) == len(set(seen)), "they overlap"


def test_a_difference_in_any_row_is_found_and_counted_once() -> None:
    height = 2 * BAND + 1
    for row in range(height):
        other = picture(1, height, bytes(row * 3) + b"\1\1\1" + bytes((height - row - 1) * 3))
        assert Comparison().differs(picture(1, height), other)
        assert not Comparison(max_different=1 / height).differs(picture(1, height), other)


def test_a_share_is_exact() -> None:
    one = picture(100, 1)
    other = picture(100, 1, b"\1" * 29 * 3 + bytes(71 * 3))
    assert 0.29 * 100 < 29, "the product would be wrong"
    assert not Comparison(max_different=0.29).differs(one, other)
    assert Comparison(max_different=0.28).differs(one, other)


def test_any_channel_counts_and_a_pixel_counts_once() -> None:
    one = picture(2, 1)
    for channel in range(3):
        pixels = bytearray(6)
        pixels[channel] = 9
        other = picture(2, 1, bytes(pixels))
        assert Comparison(tolerance=8).differs(one, other)
        assert not Comparison(tolerance=9).differs(one, other)
        assert not Comparison(max_different=0.5).differs(one, other)
    assert not Comparison(max_different=0.5).differs(one, picture(2, 1, b"\1\1\1\0\0\0"))


def test_another_size_differs() -> None:
    assert Comparison().differs(picture(4, 3), picture(3, 4))
    assert Comparison(region=(0, 0, 1, 1), max_different=1).differs(picture(4, 3), picture(5, 3))


def test_ignored_regions_may_have_names() -> None:
    one, other = picture(4, 1), picture(4, 1, bytes(9) + b"\1\1\1")
    assert Comparison().differs(one, other)
    assert not Comparison(ignore={"clock": Region(3, 0, 1, 1)}).differs(one, other)
    with pytest.raises(ConfigError, match=r"ignore\['clock'\]=.*4x1 pixels"):
        Comparison(ignore={"clock": (3, 0, 2, 1)}).differs(one, other)
    with pytest.raises(ConfigError, match=r"ignore\[1\]="):
        Comparison(ignore=[(0, 0, 1, 1), (0, 0, 0, 1)])


def test_a_reference_of_a_wrong_size() -> None:
    comparison = Comparison(region=(1, 1, 2, 2))
    with pytest.raises(ConfigError, match=r"like=.* 3x3 .* 2x2 .* 6x5: pass"):
        comparison.matches(picture(6, 5), picture(3, 3))
    with pytest.raises(ConfigError, match=r"like=.* 3x3 .* 6x5"):
        Comparison().matches(picture(6, 5), picture(3, 3))


@pytest.mark.parametrize(
    "region",
    [
        *((0, 0, 5, 1), (0, 0, 1, 4), (4, 0, 1, 1), (0, 3, 1, 1), (10**5000, 0, 1, 1)),
        *((0, 0, 0, 1), (0, 0, 1, 0), (-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, -1, 1)),
        *((0, 0, 1), (0, 0, 1, 1, 1), (0, 0, 1.0, 1), (0, 0, True, 1), (0, 0, "1", 1)),
        *(None, 5, "0011", b"0011", {}),
    ],
)
def test_what_is_no_region_of_a_picture(region: Any) -> None:
    with pytest.raises(ConfigError, match=r"^cursor=.*: pass \(left, top, width, height\)"):
        check_region(region, 4, 3, "cursor")


def test_a_region_of_a_picture() -> None:
    assert check_region((1, 2, 3, 1), 4, 3) == Region(left=1, top=2, width=3, height=1)
    assert check_region([0, 0, 4, 3], 4, 3) == Region(0, 0, 4, 3)


def test_a_region_outside_is_an_error_even_where_nothing_is_compared() -> None:
    with pytest.raises(ConfigError, match=r"region=\(0, 0, 9, 9\).* 4x3 pixels"):
        Comparison(region=(0, 0, 9, 9)).differs(picture(4, 3), picture(4, 3))
    with pytest.raises(ConfigError, match="region="):
        Comparison(region=(0, 0, 9, 9)).differs(picture(4, 3), picture(5, 3))


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("region", [5, (0, 0, 1), (0, 0, 0, 0)]),
        ("ignore", [None, 5, "clock", {1, 2}, [5], (0, 0, 1, 1), {"clock": None}]),
        ("tolerance", [-1, 256, 1.0, True, None, "8", 10**5000]),
        ("max_different", [-0.1, 1.1, float("nan"), float("inf"), True, None, "0.1", 10**5000]),
    ],
)
def test_wrong_arguments_are_found_before_there_is_a_picture(
    argument: str, values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{argument}(\[.*\])?=.*: pass"):
            Comparison(**{argument: value})
