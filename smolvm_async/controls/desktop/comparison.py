"""Comparison of two screenshots, with a region, ignored parts and a tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from smolvm_async.config.checks import check_integer, is_integer, shown
from smolvm_async.controls.desktop.picture import CHANNELS, Screenshot
from smolvm_async.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

BAND = 64  # rows to compare at a time


class Region(NamedTuple):
    """A part of a picture, in pixels. A tuple (left, top, width, height) means the same."""

    left: int
    top: int
    width: int
    height: int


Box: TypeAlias = Region | tuple[int, int, int, int]
Boxes: TypeAlias = Sequence[Box] | Mapping[str, Box]


class Comparison:
    """The rules by which two pictures count as different.

    Args:
        region: The part to compare; `None` for the whole picture.
        ignore: Regions to leave out (a clock, a cursor), with or without names.
        tolerance: Pixels count as equal if no channel differs by more than this value, 0 to 255.
        max_different: The share of the compared pixels that may differ, 0 to 1.

    Raises:
        ConfigError: An argument is wrong for pictures of any size.
    """

    def __init__(
        self,
        *,
        region: Box | None = None,
        ignore: Boxes = (),
        tolerance: int = 0,
        max_different: float = 0.0,
    ) -> None:
        self._region = None if region is None else _check_box(region, "region")
        self._ignored = _check_ignored(ignore)
        self._tolerance = check_integer(
            "tolerance", tolerance, 0, 255, "a whole number from 0 to 255"
        )
        self._max_different = _check_share(max_different)

    def parts(self, width: int, height: int) -> list[Region]:
        """Return the parts to compare in pictures of this size; the parts do not overlap.

        Raises:
            ConfigError: A region is not within such a picture, or no part is left to compare.
        """
        parts = [self._looked_at(width, height)]
        for argument, box in self._ignored.items():
            hole = check_region(box, width, height, argument)
            parts = [part for whole in parts for part in _without(whole, hole)]
        if not parts:
            raise ConfigError(
                "ignore= covers the whole region: pass smaller or fewer regions in ignore=."
            )
        return parts

    def differs(self, one: Screenshot, other: Screenshot) -> bool:
        """Return whether two pictures differ. Pictures of different sizes always differ."""
        parts = self.parts(*one.size)
        return one.size != other.size or self._differ(parts, one, other)

    def matches(self, screen: Screenshot, reference: Screenshot) -> bool:
        """Return whether the screen, or its `region`, looks like the reference."""
        self.check(screen.size, reference)
        parts, region = self.parts(*screen.size), self._looked_at(*screen.size)
        if reference.size == screen.size:
            return not self._differ(parts, screen, reference)
        return not self._differ(parts, screen, reference, region.left, region.top)

    def check(self, size: tuple[int, int], reference: Screenshot | None = None) -> None:
        """Check that the regions are within a screen of this size, and that the reference fits.

        Raises:
            ConfigError: A region is outside of the screen, or the reference has neither the size
                of the region nor the size of the screen.
        """
        self.parts(*size)
        region = self._looked_at(*size)
        if reference is not None and reference.size not in (size, region[2:]):
            raise ConfigError(
                f"like= is a picture of {reference.width}x{reference.height} pixels, but the "
                f"region has {region.width}x{region.height} and the screen {size[0]}x{size[1]}: "
                "pass a picture of one of these two sizes."
            )

    def _looked_at(self, width: int, height: int) -> Region:
        if self._region is None:
            return Region(0, 0, width, height)
        return check_region(self._region, width, height)

    def _differ(
        self, parts: list[Region], one: Screenshot, other: Screenshot, left: int = 0, top: int = 0
    ) -> bool:
        """Return whether these parts differ; `other` lies at (`left`, `top`) of `one`."""
        if one.pixels == other.pixels:
            return False
        looked_at = sum(part.width * part.height for part in parts)
        different = 0
        for band in _bands(parts):
            there = band._replace(left=band.left - left, top=band.top - top)
            different += self._count(_channels(one, band), _channels(other, there))
            if different / looked_at > self._max_different:
                return True
        return False

    def _count(self, one: Image.Image, other: Image.Image) -> int:
        """Return how many pixels differ by more than the tolerance."""
        from PIL import Image, ImageChops

        difference = ImageChops.difference(one, other)
        if not difference.getbbox():  # nothing differs; counting would take several times as long
            return 0
        size = (difference.width // CHANNELS, difference.height)
        red, green, blue = Image.frombytes("RGB", size, difference.tobytes()).split()
        largest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        return sum(largest.histogram()[self._tolerance + 1 :])


def _bands(parts: list[Region]) -> Iterator[Region]:
    """Yield the parts in bands, to save memory and to find a difference near the top early."""
    for part in parts:
        for done in range(0, part.height, BAND):
            height = min(BAND, part.height - done)
            yield part._replace(top=part.top + done, height=height)


def _channels(picture: Screenshot, part: Region) -> Image.Image:
    """Return a part of a picture as an image with a grey pixel per channel: faster than RGB."""
    from PIL import Image

    size = (picture.width * CHANNELS, picture.height)
    left, right = part.left * CHANNELS, (part.left + part.width) * CHANNELS
    image = Image.frombuffer("L", size, picture.pixels, "raw", "L", 0, 1)
    return image.crop((left, part.top, right, part.top + part.height))


def _without(whole: Region, hole: Region) -> list[Region]:
    """Return the parts of a region above, below, left of and right of the hole."""
    right, bottom = whole.left + whole.width, whole.top + whole.height
    hole_left, hole_right = max(whole.left, hole.left), min(right, hole.left + hole.width)
    hole_top, hole_bottom = max(whole.top, hole.top), min(bottom, hole.top + hole.height)
    height = hole_bottom - hole_top
    if hole_left >= hole_right or height <= 0:
        return [whole]
    around = [
        Region(whole.left, whole.top, whole.width, hole_top - whole.top),
        Region(whole.left, hole_bottom, whole.width, bottom - hole_bottom),
        Region(whole.left, hole_top, hole_left - whole.left, height),
        Region(hole_right, hole_top, right - hole_right, height),
    ]
    return [part for part in around if part.width and part.height]


def check_region(region: object, width: int, height: int, argument: str = "region") -> Region:
    """Check that a region lies within a picture of this size."""
    box = _check_box(region, argument)
    right, bottom = box.left + box.width, box.top + box.height
    if right > width or bottom > height:
        raise ConfigError(
            f"{argument}={shown(tuple(box))} ends at ({shown(right)}, {shown(bottom)}), outside of "
            f"the picture of {width}x{height} pixels: pass (left, top, width, height) of a part "
            "of the picture."
        )
    return box


def _check_box(box: object, argument: str) -> Region:
    numbers = list(box) if isinstance(box, tuple | list) else []
    if (
        len(numbers) != 4
        or not all(is_integer(number) for number in numbers)
        or min(numbers[:2]) < 0
        or min(numbers[2:]) < 1
    ):
        raise ConfigError(
            f"{argument}={shown(box)} is wrong: pass (left, top, width, height) in whole pixels, "
            "left and top 0 or more, width and height 1 or more."
        )
    return Region(*numbers)


def _check_ignored(ignore: object) -> dict[str, Region]:
    """Return the regions to ignore, keyed by name for messages; do not check the picture size."""
    if not isinstance(ignore, Mapping | tuple | list):
        raise ConfigError(
            f"ignore={shown(ignore)} is wrong: pass a list of regions (left, top, width, height), "
            "or a mapping of names to regions."
        )
    named = ignore.items() if isinstance(ignore, Mapping) else enumerate(ignore)
    arguments = {f"ignore[{name!r}]": box for name, box in named}
    return {argument: _check_box(box, argument) for argument, box in arguments.items()}


def _check_share(max_different: object) -> float:
    if (
        not (is_integer(max_different) or isinstance(max_different, float))
        or not 0 <= max_different <= 1
    ):
        raise ConfigError(
            f"max_different={shown(max_different)} is wrong: pass a share of the pixels, 0 to 1, "
            "such as 0.01."
        )
    return max_different
