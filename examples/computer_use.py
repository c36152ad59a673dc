"""A computer for computer-use models: a VM that executes the actions of any such model.

`Computer(vm)` takes actions in the models' SDK format (mappings with `action`, `coordinate`,
`text`, ...), and returns a screenshot after each action. In an agent's loop:

    computer = Computer(vm)
    for call in calls:  # the model's tool calls, as objects of the SDK
        picture = await computer.act(call.input)
        result = base64.b64encode(picture.png).decode()  # an image of type image/png

Tell the model the size of the screen: 1280x800, unless you pass `resolution=`.

The script needs neither a model nor an image: it executes a list of actions in the set-up screens
of the firmware, and saves the screenshots.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Literal

from smolvm_async import AsyncSmolVM, Screenshot, SmolVMError, VMTimeoutError

SETTLED = 1.0  # seconds without a change of the screen, after which an action is done
SETUP = "=Select Entry"  # in the last line of OVMF's set-up
PATIENCE = 5.0  # seconds to wait for a stable screen; some screens never stop changing

Button = Literal["left", "middle", "right"]
CLICKS: dict[str, tuple[Button, int]] = {
    "left_click": ("left", 1),
    "right_click": ("right", 1),
    "middle_click": ("middle", 1),
    "double_click": ("left", 2),
    "triple_click": ("left", 3),
}


class Computer:
    """Executes a model's actions on a VM."""

    def __init__(self, vm: AsyncSmolVM) -> None:
        self.vm = vm

    async def act(self, action: Mapping[str, Any]) -> Screenshot:
        """Execute one action, and return a screenshot of its effect.

        Raises:
            ValueError: The action or an argument is wrong: pass the message on to the model.
        """
        try:
            await self._perform(str(action["action"]), action)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{action!r} has a missing or wrong argument: {error}.") from error
        with contextlib.suppress(VMTimeoutError):
            return await self.vm.wait_for_screen(stable=SETTLED, timeout=PATIENCE)
        return await self.vm.screenshot()

    async def _perform(self, name: str, action: Mapping[str, Any]) -> None:
        mouse, keyboard = self.vm.mouse, self.vm.keyboard
        match name:
            case "screenshot":
                pass  # act() takes a screenshot after every action
            case "wait":
                await asyncio.sleep(max(0, action["duration"]))
            case "mouse_move":
                await mouse.move(*action["coordinate"])
            case "left_mouse_down":
                await mouse.down()
            case "left_mouse_up":
                await mouse.up()
            case "left_click_drag":
                await self._drag(action.get("start_coordinate"), *action["coordinate"])
            case "type":
                await keyboard.type(action["text"])
            case "key":
                await self._press(action["text"])
            case "hold_key":
                await keyboard.press(action["text"], hold=action["duration"])
            case "scroll":
                await self._scroll(action)
            case _ if name in CLICKS:
                button, count = CLICKS[name]
                async with self._held(action.get("text")):
                    await mouse.click(*action.get("coordinate", ()), button=button, count=count)
            case _:
                raise ValueError(
                    f"action={name!r} is unknown: use an action of the Computer class."
                )

    async def _press(self, text: str) -> None:
        """Press one chord, such as `ctrl + s` or `Page Down`, or several keys one after another."""
        try:
            await self.vm.keyboard.press(text)
        except ValueError:
            if len(keys := text.replace(" + ", "+").split()) < 2:
                raise
            for key in keys:
                await self.vm.keyboard.press(key)

    async def _drag(self, start: tuple[int, int] | None, x: int, y: int) -> None:
        """Drag from `start`, or from the mouse's position, as older models omit `start`."""
        if start is not None:
            start_x, start_y = start
            await self.vm.mouse.drag(start_x, start_y, x, y)
            return
        await self.vm.mouse.down()
        try:
            await self.vm.mouse.move(x, y)
        finally:
            await self.vm.mouse.up()

    async def _scroll(self, action: Mapping[str, Any]) -> None:
        direction, amount = action["scroll_direction"], action["scroll_amount"]
        if direction not in ("up", "down", "left", "right"):
            raise ValueError(
                f"scroll_direction={direction!r} is wrong: use up, down, left or right."
            )
        # Most programs scroll sideways while Shift is held.
        sideways = "shift" if direction in ("left", "right") else None
        if "coordinate" in action:
            await self.vm.mouse.move(*action["coordinate"])
        async with self._held(action.get("text")), self._held(sideways):
            await self.vm.mouse.scroll(amount if direction in ("down", "right") else -amount)

    @contextlib.asynccontextmanager
    async def _held(self, key: str | None) -> AsyncIterator[None]:
        """Hold a modifier key down during the block."""
        if not key:
            yield
            return
        await self.vm.keyboard.down(key)
        try:
            yield
        finally:
            await self.vm.keyboard.up(key)


SCRIPT: tuple[dict[str, Any], ...] = (  # actions that a model might send for the firmware's set-up
    {"action": "screenshot"},
    {"action": "key", "text": "Down"},
    {"action": "key", "text": "Return"},
    {"action": "key", "text": "Down Down"},
    {"action": "wait", "duration": 1},
    {"action": "key", "text": "Escape"},
    {"action": "key", "text": "Up"},
    {"action": "key", "text": "Return"},
)


async def enter_setup(vm: AsyncSmolVM) -> None:
    """Press Escape until the firmware shows its set-up, whose text is on the console, too."""
    await vm.wait_for_screen(changed=True)  # the firmware has begun to draw
    while True:
        shown = await vm.wait_for_screen(stable=SETTLED)
        if SETUP in vm.console_log():
            return
        await vm.keyboard.press("Escape")
        with contextlib.suppress(VMTimeoutError):
            await vm.wait_for_screen(changed=shown, timeout=PATIENCE)


async def look_around(image: Path, pictures: Path) -> None:
    """Execute the actions in the firmware's set-up, and save the screenshots."""
    async with AsyncSmolVM(os="windows", image=image) as vm:
        print("The firmware starts, and finds an empty disk.", flush=True)
        await enter_setup(vm)
        computer = Computer(vm)
        for number, action in enumerate(SCRIPT):
            picture = await computer.act(action)
            file = pictures / f"{number}.png"
            picture.save(file)
            print(f"{file}: {picture.width}x{picture.height}  after {action}", flush=True)
        await vm.stop(timeout=0)  # the firmware ignores the power button


def main(pictures: Path) -> None:
    """Create an empty disk and the directory for the screenshots, and run the example."""
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "empty.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
        asyncio.run(look_around(image, pictures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pictures",
        type=Path,
        default=Path("pictures"),
        help="directory for the screenshots (default pictures)",
    )
    try:
        main(parser.parse_args().pictures)
    except SmolVMError as error:
        sys.exit(f"{type(error).__name__}: {error}")
