"""`Computer`: executes the actions of computer-use models on a VM."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from smolvm_async.agents.actions import (
    Click,
    Drag,
    Hold,
    Locate,
    Look,
    Move,
    Point,
    Press,
    Scroll,
    Step,
    Type,
    Wait,
    Zoom,
    read,
)
from smolvm_async.config.checks import check_seconds
from smolvm_async.controls.desktop.picture import Screenshot
from smolvm_async.errors import ActionError, ConfigError, VMTimeoutError
from smolvm_async.foundation.tasks import in_background
from smolvm_async.vm.vm import AsyncSmolVM


@dataclass(frozen=True)
class ActionResult:
    """The effect of an action, to send back to the model.

    Attributes:
        screenshot: The screen after the action; for `zoom`, the enlarged part of the screen.
        text: The answer of `cursor_position`, such as `X=640,Y=400`; otherwise empty.
    """

    screenshot: Screenshot
    text: str = ""


class Computer:
    """Executes the actions of a computer-use model on a VM.

    The actions are those of Anthropic's computer tool (`computer_20241022` to `computer_20251124`,
    and `computer_toolset_20260801`) and of OpenAI's (`computer_use_preview` and `computer`); see
    `smolvm_async.agents.actions`. Tell the model the size of the screen: 1280x800, unless you pass
    `resolution=` to the VM. All positions are pixels of the whole screenshot.

    Args:
        vm: A running VM, of this process or attached.
        settle: Seconds without a change of the screen, after which an action counts as done.
        patience: Seconds to wait for that; some screens never stop changing.
    """

    def __init__(self, vm: AsyncSmolVM, *, settle: float = 1.0, patience: float = 5.0) -> None:
        check_seconds("settle", settle)
        check_seconds("patience", patience)
        self.vm = vm
        self._settle, self._patience = settle, patience
        self._position: Point | None = None
        self._turn = asyncio.Lock()  # a model may call several tools at once

    async def act(self, action: object) -> ActionResult:
        """Execute an action, or a call with several, and return the screen afterwards.

        Args:
            action: The action as the vendor's SDK gives it: a mapping or an object. Pass the whole
                `tool_use` block of Anthropic's toolset, whose name is the action, and the whole
                `computer_call` of OpenAI's tool, which may have several actions.

        Raises:
            ActionError: The action is wrong: pass the message on to the model. Nothing was done if
                a field is missing or wrong; if a key or a position does not exist, the actions
                before this one were done.
            VMTimeoutError: The guest does not read its mouse or its keyboard.
            VMNotRunningError: The VM is not running, or is paused.
        """
        steps, text = read(action), ""
        async with self._turn:
            for step in steps:
                try:
                    text = await self._do(step) or text
                except ConfigError as error:
                    raise ActionError(error.message, hint=error.hint, action=action) from error
            if isinstance(steps[-1], Zoom):
                return ActionResult(await self._zoom(steps[-1], action))
            return ActionResult(await self._settled(), text)

    async def _settled(self) -> Screenshot:
        with contextlib.suppress(VMTimeoutError):
            return await self.vm.wait_for_screen(stable=self._settle, timeout=self._patience)
        return await self.vm.screenshot()

    async def _do(self, step: Step) -> str:
        """Execute a step, and return the answer to the model if the step asks for one."""
        mouse, keyboard = self.vm.mouse, self.vm.keyboard
        match step:
            case Look() | Zoom():
                pass  # act() takes a screenshot after the last step
            case Locate():
                return self._located()
            case Wait(seconds):
                await asyncio.sleep(seconds)
            case Move(point, held):
                async with self._held(held):
                    await mouse.move(*point)
                self._position = point
            case Click(point, button, count, held):
                async with self._held(held):
                    await mouse.click(*(point or ()), button=button, count=count)
                self._position = point or self._position
            case Hold(down):
                await (mouse.down() if down else mouse.up())
            case Drag(path, from_here, held):
                async with self._held(held):
                    await self._drag(path, from_here)
                self._position = path[-1]
            case Scroll():
                await self._scroll(step)
            case Type(text):
                await keyboard.type(text)
            case Press(keys, repeat, seconds):
                for _ in range(repeat):
                    await self._press(keys, seconds)
        return ""

    def _located(self) -> str:
        if self._position is None:
            raise ConfigError("cursor_position is unknown: move the mouse first.")
        x, y = self._position
        return f"X={x},Y={y}"

    async def _press(self, keys: str, seconds: float) -> None:
        """Press a chord, such as `ctrl + s` or `Page Down`; or, as xdotool, `Down Down Return`."""
        try:
            await self.vm.keyboard.press(keys, hold=seconds)
        except ConfigError:
            if len(several := keys.replace(" + ", "+").split()) < 2:
                raise
            for one in several:
                await self.vm.keyboard.press(one, hold=seconds)

    async def _drag(self, path: tuple[Point, ...], from_here: bool) -> None:
        mouse = self.vm.mouse
        if len(path) == 2 and not from_here:
            (start_x, start_y), (end_x, end_y) = path
            await mouse.drag(start_x, start_y, end_x, end_y)
            return
        if not from_here:
            await mouse.move(*path[0])
        await mouse.down()
        try:
            for point in path if from_here else path[1:]:
                await mouse.move(*point)
        finally:
            await mouse.up()

    async def _scroll(self, step: Scroll) -> None:
        if step.point:
            await self.vm.mouse.move(*step.point)
            self._position = step.point
        async with self._held(step.held):
            if step.down:
                await self.vm.mouse.scroll(step.down)
            if step.right:  # most programs scroll sideways while Shift is held
                async with self._held("shift"):
                    await self.vm.mouse.scroll(step.right)

    @contextlib.asynccontextmanager
    async def _held(self, keys: str) -> AsyncIterator[None]:
        """Hold keys down during the block."""
        if not keys:
            yield
            return
        await self.vm.keyboard.down(keys)
        try:
            yield
        finally:
            await self.vm.keyboard.up(keys)

    async def _zoom(self, region: Zoom, action: object) -> Screenshot:
        picture = await self.vm.screenshot()
        (_, _, right, bottom), (width, height) = region.box, picture.size
        if right > width or bottom > height:
            message = f"region={list(region.box)} is wrong: the screenshot is {width}x{height}."
            raise ActionError(message, action=action)
        return await in_background(enlarged, picture, region.box)


def enlarged(picture: Screenshot, box: tuple[int, int, int, int]) -> Screenshot:
    """Return a part of a picture, enlarged to the picture's width or height."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(picture.width / width, picture.height / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = picture.image().resize(size, box=box)
    forms = {"pixels": image.tobytes()}
    result = Screenshot(*size, picture.timestamp, picture.elapsed, forms)
    _ = result.png  # encoding takes up to 100 ms: do it in this thread
    return result
