"""The actions of computer-use models: what each becomes, and the errors for wrong ones."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from smolvm_async import ActionError, ConfigError, Screenshot, VMTimeoutError
from smolvm_async.agents import Computer
from smolvm_async.agents.actions import (
    Click,
    Drag,
    Hold,
    Locate,
    Look,
    Move,
    Press,
    Scroll,
    Step,
    Type,
    Wait,
    Zoom,
    read,
)
from smolvm_async.agents.computer import enlarged
from smolvm_async.controls.desktop.layouts import chord

ANTHROPIC: list[tuple[dict[str, Any], Step]] = [
    ({"action": "screenshot"}, Look()),
    ({"action": "cursor_position"}, Locate()),
    ({"action": "zoom", "region": [0, 10, 20, 30]}, Zoom((0, 10, 20, 30))),
    ({"action": "wait", "duration": 2}, Wait(2)),
    ({"action": "mouse_move", "coordinate": [3, 4.0]}, Move((3, 4))),
    ({"action": "left_click", "coordinate": [3, 4]}, Click((3, 4), "left", 1)),
    ({"action": "left_click", "coordinate": None, "text": None}, Click(None, "left", 1)),
    ({"action": "right_click", "text": "ctrl"}, Click(None, "right", 1, "ctrl")),
    ({"action": "middle_click", "coordinate": (0, 0)}, Click((0, 0), "middle", 1)),
    ({"action": "double_click"}, Click(None, "left", 2)),
    ({"action": "triple_click"}, Click(None, "left", 3)),
    ({"action": "left_mouse_down"}, Hold(True)),
    ({"action": "left_mouse_up"}, Hold(False)),
    ({"action": "left_click_drag", "coordinate": [5, 6]}, Drag(((5, 6),), from_here=True)),
    (
        {
            "action": "left_click_drag",
            "text": "shift",
            "start_coordinate": [1, 2],
            "coordinate": [5, 6],
        },
        Drag(((1, 2), (5, 6)), held="shift"),
    ),
    (
        {"action": "scroll", "scroll_direction": "up", "scroll_amount": 5, "coordinate": [1, 2]},
        Scroll((1, 2), -5, 0),
    ),
    (
        {"action": "scroll", "scroll_direction": "right", "scroll_amount": 2, "text": "ctrl"},
        Scroll(None, 0, 2, "ctrl"),
    ),
    ({"action": "type", "text": "a b\n"}, Type("a b\n")),
    ({"action": "key", "text": "ctrl+s"}, Press("ctrl+s")),
    ({"action": "key", "text": "Down", "repeat": 3}, Press("Down", 3)),
    ({"action": "hold_key", "text": "w", "duration": 0.5}, Press("w", seconds=0.5)),
]
OPENAI: list[tuple[dict[str, Any], Step]] = [
    ({"type": "screenshot"}, Look()),
    ({"type": "wait"}, Wait(2)),
    ({"type": "move", "x": 1, "y": 2}, Move((1, 2))),
    ({"type": "click", "x": 1, "y": 2, "button": "left"}, Click((1, 2), "left", 1)),
    ({"type": "click", "x": 1, "y": 2, "button": "wheel"}, Click((1, 2), "middle", 1)),
    (
        {"type": "click", "x": 1, "y": 2, "button": "right", "keys": ["CTRL", "SHIFT"]},
        Click((1, 2), "right", 1, "CTRL+SHIFT"),
    ),
    ({"type": "double_click", "x": 1, "y": 2, "keys": None}, Click((1, 2), "left", 2)),
    (
        {"type": "drag", "path": [{"x": 1, "y": 2}, {"x": 3, "y": 4}, [5, 6]]},
        Drag(((1, 2), (3, 4), (5, 6))),
    ),
    ({"type": "scroll", "x": 1, "y": 2, "scroll_x": 0, "scroll_y": 350}, Scroll((1, 2), 4, 0)),
    ({"type": "scroll", "x": 1, "y": 2, "scroll_x": -9, "scroll_y": 0}, Scroll((1, 2), 0, -1)),
    ({"type": "type", "text": "penguin"}, Type("penguin")),
    ({"type": "keypress", "keys": ["CTRL", "S"]}, Press("CTRL+S")),
]
WRONG: list[tuple[Any, str]] = [
    (None, "None is not an action: pass an object"),
    ("left_click", "'left_click' is not an action"),
    ({}, "type is missing: use one of screenshot, wait,"),
    ({"action": "fly"}, "action='fly' is wrong: use one of screenshot, zoom,"),
    ({"action": ["key"]}, r"action=\['key'\] is wrong"),
    ({"type": "left_click"}, "type='left_click' is wrong: use one of .* double_click"),
    ({"type": "tool_use", "name": "left_click"}, "None is not an action"),
    ({"type": "tool_use", "name": "browse", "input": {}}, "action='browse' is wrong"),
    ({"type": "computer_call", "actions": "click"}, "'click' is wrong: pass a list"),
    ({"type": "computer_call"}, "None is not an action"),
    ({"action": "mouse_move"}, "mouse_move: coordinate is missing: pass \\[x, y\\]"),
    ({"action": "left_click", "coordinate": [1]}, r"left_click: coordinate=\[1\] is wrong"),
    ({"action": "left_click", "coordinate": [1, -2]}, "is wrong"),
    ({"action": "left_click", "coordinate": [1, 2.5]}, "is wrong"),
    ({"action": "left_click", "coordinate": "12"}, "is wrong"),
    ({"action": "left_click", "x": 1}, "x=1 is wrong: this action does not have this field"),
    ({"action": "wait", "duration": 301}, "wait: duration=301 is wrong: pass seconds from 0 to"),
    ({"action": "wait", "duration": float("nan")}, "duration=nan is wrong"),
    ({"action": "key", "text": ""}, "key: text='' is wrong"),
    ({"action": "key", "text": "a", "repeat": 0}, "repeat=0 is wrong: .* from 1 to 100"),
    ({"action": "scroll", "scroll_direction": "in", "scroll_amount": 1}, "use|pass one of up,"),
    ({"action": "zoom", "region": [5, 5, 5, 9]}, "x0 < x1"),
    ({"type": "click", "x": 1, "y": None}, "click: y is missing"),
    ({"type": "click", "x": 1, "y": 2, "button": "back"}, "button='back' is wrong: pass one of"),
    ({"type": "drag", "path": [{"x": 1, "y": 2}]}, "path=.* is wrong: pass two positions"),
    (
        {"type": "keypress", "keys": "a"},
        'keys=.a. is wrong: pass a list of keys, such as \\["CTRL"',
    ),
    ({"type": "keypress", "keys": [1]}, "pass names of keys"),
]


@pytest.mark.parametrize(("action", "step"), [*ANTHROPIC, *OPENAI])
def test_each_action_of_the_vendors_becomes_a_step(action: dict[str, Any], step: Step) -> None:
    assert read(action) == [step]


@pytest.mark.parametrize(("action", "message"), WRONG)
def test_a_wrong_action_is_an_error_that_names_the_field(action: Any, message: str) -> None:
    with pytest.raises(ActionError, match=message) as raised:
        read(action)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(("action", "step"), ANTHROPIC)
def test_a_block_of_the_toolset_has_the_action_as_its_name(
    action: dict[str, Any], step: Step
) -> None:
    fields = {key: value for key, value in action.items() if key != "action"}
    block = {"type": "tool_use", "id": "toolu_1", "toolset_name": "computer"}
    assert read({**block, "name": action["action"], "input": fields}) == [step]
    assert read({**block, "name": "computer", "input": action}) == [step]  # before the toolset


def test_a_call_has_one_action_or_several_and_may_be_an_object_of_an_sdk() -> None:
    several = [{"type": "move", "x": 1, "y": 2}, {"type": "type", "text": "a"}]
    call = {"type": "computer_call", "call_id": "call_1", "action": None, "actions": several}
    steps: list[Step] = [Move((1, 2)), Type("a")]
    assert read(call) == read(SimpleNamespace(model_dump=lambda: call)) == steps
    assert read({"type": "computer_call", "actions": None, "action": several[1]}) == [Type("a")]


@pytest.mark.parametrize(
    "keys",
    [
        *("Return", "Page_Up", "BackSpace", "super+r", "KP_0", "ctrl+shift+Escape", "space"),
        *("ENTER", "ARROWLEFT", "PAGEUP", "CTRL+A", "CMD+C", "OPTION+TAB", "SUPER", "ESC"),
    ],
)
def test_the_keys_that_the_models_name_are_on_the_keyboard(keys: str) -> None:
    assert chord(keys, "us")


class FakeVM:
    """A VM that notes the calls of its mouse and keyboard; the call named `fails` fails."""

    def __init__(self, fails: str = "", error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fails, self._error = fails, error
        self.mouse, self.keyboard = self._device("mouse"), self._device("keyboard")
        self.picture = Screenshot(4, 2, 0.0, 0.0, {"pixels": bytes(range(24))})

    def _device(self, device: str) -> Any:
        vm = self

        class Device:
            def __getattr__(self, name: str) -> Any:
                async def call(*arguments: Any, **options: Any) -> None:
                    vm.calls.append((f"{device}.{name}", *arguments, *options.values()))
                    if name == vm._fails and vm._error:
                        raise vm._error

                return call

        return Device()

    async def wait_for_screen(self, **_: Any) -> Screenshot:
        raise VMTimeoutError("the screen never stops changing")

    async def screenshot(self) -> Screenshot:
        return self.picture


def acted(vm: FakeVM, *actions: Any) -> Any:
    async def act() -> Any:
        computer = Computer(vm)  # type: ignore[arg-type]
        for action in actions:
            result = await computer.act(action)
        return result

    return asyncio.run(act())


def test_keys_are_held_during_a_click_and_released_though_it_fails() -> None:
    click = {"action": "left_click", "coordinate": [1, 2], "text": "ctrl+shift"}
    around = [("keyboard.down", "ctrl+shift"), ("keyboard.up", "ctrl+shift")]
    vm = FakeVM()
    assert acted(vm, click).screenshot is vm.picture  # although the screen never settled
    assert vm.calls == [around[0], ("mouse.click", 1, 2, "left", 1), around[1]]
    vm = FakeVM("click", ConfigError("x=1 is not on the screen"))
    with pytest.raises(ActionError, match="not on the screen") as raised:
        acted(vm, click)
    assert raised.value.action == click
    assert vm.calls[-1] == around[1]


def test_a_drag_through_several_points_ends_with_the_button_up() -> None:
    path = [{"x": 1, "y": 2}, {"x": 3, "y": 4}, {"x": 5, "y": 6}]
    vm = FakeVM()
    acted(vm, {"type": "drag", "path": path})
    moves = [("mouse.move", *point.values()) for point in path]
    assert vm.calls == [moves[0], ("mouse.down",), *moves[1:], ("mouse.up",)]
    vm = FakeVM("move", VMTimeoutError("the guest does not read the tablet"))
    with pytest.raises(VMTimeoutError):
        acted(vm, {"action": "left_click_drag", "coordinate": [1, 2]})
    assert [name for name, *_ in vm.calls] == ["mouse.down", "mouse.move", "mouse.up"]


def test_scrolling_sideways_holds_shift() -> None:
    vm = FakeVM()
    acted(vm, {"type": "scroll", "x": 1, "y": 2, "scroll_x": -200, "scroll_y": 300})
    wheel = [("mouse.scroll", 3), ("keyboard.down", "shift"), ("mouse.scroll", -2)]
    assert vm.calls == [("mouse.move", 1, 2), *wheel, ("keyboard.up", "shift")]


def test_several_keys_that_are_not_a_chord_are_pressed_one_after_another() -> None:
    vm = FakeVM("press", ConfigError("key='Down Down' is not a known key"))
    with pytest.raises(ActionError):
        acted(vm, {"action": "key", "text": "Down Down"})
    assert vm.calls == [("keyboard.press", "Down Down", 0), ("keyboard.press", "Down", 0)]


def test_the_position_of_the_mouse_is_the_last_one_that_was_set() -> None:
    where = {"action": "cursor_position"}
    with pytest.raises(ActionError, match="move the mouse first"):
        acted(FakeVM(), where)
    there = {"action": "left_click", "coordinate": [7, 8]}
    assert acted(FakeVM(), there, {"action": "left_click"}, where).text == "X=7,Y=8"


def test_a_zoom_shows_a_part_of_the_screen_as_large_as_the_screen() -> None:
    vm = FakeVM()
    shown = acted(vm, {"action": "zoom", "region": [0, 0, 2, 1]}).screenshot
    assert shown.size == vm.picture.size
    assert shown == enlarged(vm.picture, (0, 0, 2, 1)) != vm.picture
    with pytest.raises(ActionError, match="the screenshot is 4x2"):
        acted(vm, {"action": "zoom", "region": [0, 0, 5, 1]})


def test_nothing_of_a_call_is_done_if_an_action_of_it_is_wrong() -> None:
    vm = FakeVM()
    with pytest.raises(ActionError):
        acted(vm, {"type": "computer_call", "actions": [{"type": "type", "text": "a"}, {}]})
    assert vm.calls == []
