"""The actions of the vendors' computer-use tools, read into steps. Pure: no VM, no pictures.

========================================== ========================================================
tool                                       an action
========================================== ========================================================
Anthropic's `computer_20241022`,           `{"action": "left_click", "coordinate": [640, 400]}`
`computer_20250124`, `computer_20251124`
Anthropic's `computer_toolset_20260801`    a `tool_use` block, whose name is the action:
                                           `{"type": "tool_use", "name": "left_click", "input":
                                           {"coordinate": [640, 400]}, ...}`
OpenAI's `computer_use_preview` (`action`) `{"type": "click", "x": 640, "y": 400, ...}`, or the
and `computer` (`actions`)                 `computer_call` with the action or the actions
========================================== ========================================================

A whole call is read before its first step is executed, so a wrong action changes nothing. A field
that is `None` counts as missing, since the SDKs' objects have every field. An unknown field is an
error: if it were ignored, the model would think that it had an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from smolvm_async.config.checks import shown
from smolvm_async.controls.desktop.mouse import Button
from smolvm_async.errors import ActionError

MAX_SECONDS = 300  # of `wait` and `hold_key`
MAX_REPEAT = 100  # of `key`
MAX_CLICKS = 1000  # of the wheel
SCROLLED = 100  # pixels that one click of the wheel scrolls: OpenAI's models count in pixels
PAUSE = 2.0  # seconds: OpenAI's `wait` has no duration

Point = tuple[int, int]


@dataclass(frozen=True)
class Look:
    """Only take a screenshot."""


@dataclass(frozen=True)
class Zoom:
    """Take a screenshot of a part of the screen, enlarged."""

    box: tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Locate:
    """Report the mouse's position."""


@dataclass(frozen=True)
class Wait:
    """Wait for some seconds."""

    seconds: float


@dataclass(frozen=True)
class Move:
    """Move the mouse while the keys `held` are down."""

    point: Point
    held: str = ""


@dataclass(frozen=True)
class Click:
    """Click at a position, or where the mouse is."""

    point: Point | None
    button: Button
    count: int
    held: str = ""


@dataclass(frozen=True)
class Hold:
    """Press the left button and leave it down, or release it."""

    down: bool


@dataclass(frozen=True)
class Drag:
    """Drag with the left button along a path, from its first point or from where the mouse is."""

    path: tuple[Point, ...]
    from_here: bool = False
    held: str = ""


@dataclass(frozen=True)
class Scroll:
    """Turn the wheel: clicks down and to the right, negative for up and left."""

    point: Point | None
    down: int
    right: int
    held: str = ""


@dataclass(frozen=True)
class Type:
    """Type a text."""

    text: str


@dataclass(frozen=True)
class Press:
    """Press keys together, and release them after some seconds; all that several times."""

    keys: str
    repeat: int = 1
    seconds: float = 0.0


Step: TypeAlias = Look | Zoom | Locate | Wait | Move | Click | Hold | Drag | Scroll | Type | Press


def read(action: object) -> list[Step]:
    """Return the steps of one action, or of a call with several actions.

    Args:
        action: A mapping, or an object of a vendor's SDK.

    Raises:
        ActionError: A field is missing, wrong or unknown.
    """
    values = _mapping(action)
    if values.get("type") != "computer_call":
        return [_read_one(values)]
    several = values.get("actions") or [values.get("action")]
    if not isinstance(several, list | tuple):
        raise ActionError(f"actions={shown(several)} is wrong: pass a list.", action=values)
    return [_read_one(_mapping(one)) for one in several]


def _read_one(values: Mapping[str, Any]) -> Step:
    if values.get("type") == "tool_use":
        fields = _mapping(values.get("input"))
        if "action" not in fields:  # the toolset's block: its name is the action
            fields = {**fields, "action": values.get("name")}
        return _step(fields, "action", ANTHROPIC)
    if "action" in values:
        return _step(values, "action", ANTHROPIC)
    return _step(values, "type", OPENAI)


def _mapping(action: object) -> Mapping[str, Any]:
    dump = getattr(action, "model_dump", None)  # an object of an SDK
    values = dump() if callable(dump) else action
    if isinstance(values, Mapping):
        return values
    raise ActionError(
        f"{shown(action)} is not an action: pass an object such as "
        '{"action": "left_click", "coordinate": [640, 400]}.',
        action=action,
    )


def _step(values: Mapping[str, Any], key: str, table: Mapping[str, Reader]) -> Step:
    name = values.get(key)
    fields = Fields(values, key)
    if not isinstance(name, str) or name not in table:
        raise fields.wrong(key, f"use one of {', '.join(table)}")
    step = table[name](fields)
    fields.check_all_read()
    return step


class Fields:
    """The fields of one action. Each method reads and checks a field."""

    def __init__(self, values: Mapping[str, Any], key: str) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._unread = set(self._values) - {key}
        self._key = key

    def wrong(self, field: str, advice: str) -> ActionError:
        """Return the error for a field."""
        action = "" if field == self._key else f"{self._values[self._key]}: "
        value = self._values.get(field)
        state = f"{field} is missing" if value is None else f"{field}={shown(value)} is wrong"
        return ActionError(f"{action}{state}: {advice}.", action=self._values)

    def check_all_read(self) -> None:
        """Refuse fields that the action does not have."""
        for field in sorted(self._unread):
            raise self.wrong(field, "this action does not have this field")

    def _take(self, field: str) -> Any:
        self._unread.discard(field)
        return self._values.get(field)

    def has(self, field: str) -> bool:
        """Return whether the field is there."""
        return field in self._values

    def whole(self, field: str, least: int, most: int, default: int | None = None) -> int:
        """Read a whole number; models also write 3.0."""
        value = self._take(field)
        if value is None and default is not None:
            return default
        if not _is_whole(value) or not least <= value <= most:
            raise self.wrong(field, f"pass a whole number from {least} to {most}")
        return int(value)

    def seconds(self, field: str) -> float:
        """Read a duration."""
        value = self._take(field)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= MAX_SECONDS:
            raise self.wrong(field, f"pass seconds from 0 to {MAX_SECONDS}")
        return float(value)

    def text(self, field: str) -> str:
        """Read a text."""
        value = self._take(field)
        if not isinstance(value, str) or not value:
            raise self.wrong(field, "pass a text that is not empty")
        return value

    def choice(self, field: str, choices: Sequence[str]) -> str:
        """Read one of several words."""
        value = self._take(field)
        if value not in choices:
            raise self.wrong(field, f"pass one of {', '.join(choices)}")
        return str(value)

    def pixels(self, field: str, count: int, form: str) -> tuple[int, ...]:
        """Read a list of `count` pixels, such as a position."""
        value = self._take(field)
        if not _are_pixels(value, count):
            raise self.wrong(field, f"pass {form}, in pixels of the whole screenshot")
        return tuple(map(int, value))

    def point(self, field: str) -> Point:
        """Read a position."""
        x, y = self.pixels(field, 2, "[x, y]")
        return x, y

    def x_and_y(self) -> Point:
        """Read a position that is in two fields."""
        advice = "pass a pixel of the whole screenshot"
        for field in ("x", "y"):
            if not _are_pixels([self._take(field)], 1):
                raise self.wrong(field, advice)
        return int(self._values["x"]), int(self._values["y"])

    def path(self, field: str) -> tuple[Point, ...]:
        """Read the positions of a drag, which are objects or lists."""
        value = self._take(field)
        listed: Any = value if isinstance(value, list | tuple) and len(value) > 1 else [None]
        points: list[Any] = [
            (p.get("x"), p.get("y")) if isinstance(p, Mapping) else p for p in listed
        ]
        if not all(_are_pixels(point, 2) for point in points):
            raise self.wrong(field, 'pass two positions or more, such as {"x": 10, "y": 20}')
        return tuple((int(x), int(y)) for x, y in points)

    def keys(self, field: str) -> str:
        """Read the names of keys that are down together, as one chord."""
        value = self._take(field)
        if not value or not isinstance(value, list | tuple):
            raise self.wrong(field, 'pass a list of keys, such as ["CTRL", "S"]')
        if not all(isinstance(key, str) and key for key in value):
            raise self.wrong(field, 'pass names of keys, such as ["CTRL", "S"]')
        return "+".join(value)


Reader: TypeAlias = Callable[[Fields], Step]


def _is_whole(value: object) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _are_pixels(value: object, count: int) -> bool:
    if not isinstance(value, list | tuple) or len(value) != count:
        return False
    return all(_is_whole(pixel) and pixel >= 0 for pixel in value)


# Anthropic's actions.


def _held(fields: Fields) -> str:
    return fields.text("text") if fields.has("text") else ""


def _here_or_there(fields: Fields) -> Point | None:
    return fields.point("coordinate") if fields.has("coordinate") else None


def _click(button: Button, count: int, fields: Fields) -> Step:
    return Click(_here_or_there(fields), button, count, _held(fields))


def _left_click_drag(fields: Fields) -> Step:
    """Read a drag; models of 2024 omit the start."""
    end, held = fields.point("coordinate"), _held(fields)
    if not fields.has("start_coordinate"):
        return Drag((end,), from_here=True, held=held)
    return Drag((fields.point("start_coordinate"), end), held=held)


def _wheel(fields: Fields) -> Step:
    direction = fields.choice("scroll_direction", ("up", "down", "left", "right"))
    clicks = fields.whole("scroll_amount", 0, MAX_CLICKS)
    clicks = clicks if direction in ("down", "right") else -clicks
    down, right = (clicks, 0) if direction in ("up", "down") else (0, clicks)
    return Scroll(_here_or_there(fields), down, right, _held(fields))


def _zoom(fields: Fields) -> Step:
    left, top, right, bottom = fields.pixels("region", 4, "[x0, y0, x1, y1]")
    if left >= right or top >= bottom:
        raise fields.wrong("region", "pass [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return Zoom((left, top, right, bottom))


ANTHROPIC: Mapping[str, Reader] = {
    "screenshot": lambda fields: Look(),
    "zoom": _zoom,
    "cursor_position": lambda fields: Locate(),
    "wait": lambda fields: Wait(fields.seconds("duration")),
    "mouse_move": lambda fields: Move(fields.point("coordinate")),
    "left_click": partial(_click, "left", 1),
    "right_click": partial(_click, "right", 1),
    "middle_click": partial(_click, "middle", 1),
    "double_click": partial(_click, "left", 2),
    "triple_click": partial(_click, "left", 3),
    "left_click_drag": _left_click_drag,
    "left_mouse_down": lambda fields: Hold(True),
    "left_mouse_up": lambda fields: Hold(False),
    "scroll": _wheel,
    "type": lambda fields: Type(fields.text("text")),
    "key": lambda fields: Press(fields.text("text"), fields.whole("repeat", 1, MAX_REPEAT, 1)),
    "hold_key": lambda fields: Press(fields.text("text"), seconds=fields.seconds("duration")),
}


# OpenAI's actions.

BUTTONS: Mapping[str, Button] = {"left": "left", "right": "right", "wheel": "middle"}


def _down_together(fields: Fields) -> str:
    return fields.keys("keys") if fields.has("keys") else ""


def _button(fields: Fields) -> Step:
    name = fields.choice("button", list(BUTTONS)) if fields.has("button") else "left"
    return Click(fields.x_and_y(), BUTTONS[name], 1, _down_together(fields))


def _pixels_scrolled(fields: Fields) -> Step:
    most = MAX_CLICKS * SCROLLED
    down, right = (fields.whole(name, -most, most, 0) for name in ("scroll_y", "scroll_x"))
    return Scroll(fields.x_and_y(), _clicks(down), _clicks(right), _down_together(fields))


def _clicks(pixels: int) -> int:
    """Return the clicks of the wheel for a distance; any distance is at least one click."""
    clicks = max(1, round(abs(pixels) / SCROLLED)) if pixels else 0
    return clicks if pixels > 0 else -clicks


OPENAI: Mapping[str, Reader] = {
    "screenshot": lambda fields: Look(),
    "wait": lambda fields: Wait(PAUSE),
    "move": lambda fields: Move(fields.x_and_y(), _down_together(fields)),
    "click": _button,
    "double_click": lambda fields: Click(fields.x_and_y(), "left", 2, _down_together(fields)),
    "drag": lambda fields: Drag(fields.path("path"), held=_down_together(fields)),
    "scroll": _pixels_scrolled,
    "type": lambda fields: Type(fields.text("text")),
    "keypress": lambda fields: Press(fields.keys("keys")),
}
