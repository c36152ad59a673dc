"""A computer for computer-use models: their actions on a VM's desktop, whichever model it is.

`Computer(vm)` takes the actions that such models emit, as their SDKs hand them over (mappings with
`action`, `coordinate`, `text`, ...), and answers each with a screenshot. In an agent's loop:

    computer = Computer(vm)
    for call in calls:  # the model's, in the SDK's own type
        picture = await computer.act(call.input)
        result = base64.b64encode(picture.png).decode()  # an image of type image/png

Tell the model the size of the screen: 1280x800, unless you pass another `resolution=`.

Run as it is, it needs no model and no image: a script of such actions looks through the
firmware's set-up screens, and the pictures that it saw are saved.
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

SETTLED = 1.0  # seconds without a change: the action has had its effect
SETUP = (640, 480)  # OVMF's
PATIENCE = 5.0  # seconds for that; some screens never rest

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
        """Execute one action; returns what the screen shows once it has had its effect.

        Raises:
            ValueError: The action or its arguments are wrong: tell the model, which will mend it.
        """
        try:
            await self._perform(str(action["action"]), action)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{action!r} lacks something, or has it wrong: {error}.") from error
        with contextlib.suppress(VMTimeoutError):
            return await self.vm.wait_for_screen(stable=SETTLED, timeout=PATIENCE)
        return await self.vm.screenshot()

    async def _perform(self, name: str, action: Mapping[str, Any]) -> None:
        mouse, keyboard = self.vm.mouse, self.vm.keyboard
        match name:
            case "screenshot":
                pass  # act() takes one anyway
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
                raise ValueError(f"action={name!r} is not known here.")

    async def _press(self, text: str) -> None:
        """Press what is one chord, such as `ctrl + s` or `Page Down`; else one after another."""
        try:
            await self.vm.keyboard.press(text)
        except ValueError:
            if len(keys := text.replace(" + ", "+").split()) < 2:
                raise
            for key in keys:
                await self.vm.keyboard.press(key)

    async def _drag(self, start: tuple[int, int] | None, x: int, y: int) -> None:
        """Drag from a place, or, as older models do, from where the mouse is."""
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
            raise ValueError(f"scroll_direction={direction!r}: up, down, left or right.")
        sideways = "shift" if direction in ("left", "right") else None  # as programs have it
        if "coordinate" in action:
            await self.vm.mouse.move(*action["coordinate"])
        async with self._held(action.get("text")), self._held(sideways):
            await self.vm.mouse.scroll(amount if direction in ("down", "right") else -amount)

    @contextlib.asynccontextmanager
    async def _held(self, key: str | None) -> AsyncIterator[None]:
        """A modifier is down for the time of the block."""
        if not key:
            yield
            return
        await self.vm.keyboard.down(key)
        try:
            yield
        finally:
            await self.vm.keyboard.up(key)


SCRIPT: tuple[dict[str, Any], ...] = (  # what a model might do in the firmware's set-up
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
    """Press Escape until the firmware shows its set-up, in a mode smaller than it boots in."""
    while (await vm.wait_for_screen(changed=True)).size == SETUP:
        pass  # QEMU shows that size too, until the firmware draws something
    while (shown := await vm.wait_for_screen(stable=SETTLED)).size != SETUP:
        await vm.keyboard.press("Escape")
        with contextlib.suppress(VMTimeoutError):
            await vm.wait_for_screen(changed=shown, timeout=PATIENCE)


async def look_around(image: Path, pictures: Path) -> None:
    """Look through the set-up, and save what was seen."""
    async with AsyncSmolVM(os="windows", image=image) as vm:
        print("The firmware starts, and finds nothing on an empty disk.", flush=True)
        await enter_setup(vm)
        computer = Computer(vm)
        for number, action in enumerate(SCRIPT):
            picture = await computer.act(action)
            file = pictures / f"{number}.png"
            picture.save(file)
            print(f"{file}: {picture.width}x{picture.height}  after {action}", flush=True)
        await vm.stop(timeout=0)  # the firmware has no use for the power button


def main(pictures: Path) -> None:
    """Make an empty disk, and a directory for the pictures."""
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "empty.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
        asyncio.run(look_around(image, pictures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, default=Path("pictures"), help="where to")
    try:
        main(parser.parse_args().pictures)
    except SmolVMError as error:
        sys.exit(f"{type(error).__name__}: {error}")
