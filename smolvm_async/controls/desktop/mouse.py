"""The mouse: a USB tablet, which reports positions on the screen and not movements.

Every call first waits until the guest has a driver for the tablet. Until then QEMU accepts the
events and drops them without an error: firmware, boot loaders and a starting operating system do
not read the tablet, so a click would be lost and the caller would not know. QEMU reports which
device the guest reads (`query-mice`): the tablet is "current" and "absolute" once the driver has
set it up. After a reset QEMU still reports the state before the reset, so the boot state must be
`operating_system` or later, too. A guest without a driver never reads the tablet, and the call
raises `VMTimeoutError` after `Timeouts.input` seconds.

The tablet holds 16 events, and the guest reads them every 8 ms. So the calls pause between two
changes: without the pauses, a busy guest would lose events.

If a call fails or is cancelled while a button is down, or if the VM is paused then, the button
would stay down in the guest. So every call that ends early posts the release by `Input.post()`,
which needs no await, and which sends the release once the guest runs again.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
from collections.abc import AsyncIterator
from typing import Literal, SupportsIndex, get_args

from smolvm_async.config.checks import check_integer, check_seconds, shown
from smolvm_async.controls.desktop.screen import Screen
from smolvm_async.controls.interface import VM, Control
from smolvm_async.errors import ConfigError, VMTimeoutError
from smolvm_async.foundation.log import get_logger
from smolvm_async.qemu.events import BootState
from smolvm_async.qemu.input import AXIS, InputEvent, position, released
from smolvm_async.qemu.input import button as button_event

logger = get_logger(__name__)

Button = Literal["left", "middle", "right"]
Point = tuple[int, ...]  # x and y in pixels; empty for the mouse's current position

PACE = 0.02  # seconds between two changes
POLL = 0.05  # seconds between two checks whether the guest reads the tablet
STEPS = 20  # movements in a drag: programs expect to see the mouse on its way


class Mouse(Control):
    """A mouse. Positions are pixels of the last screenshot (of the screen, if there was none).

    Calls run one after another. A call that fails or is cancelled leaves no button down. Only
    `down()` leaves a button down, until `up()`. Each call waits until the guest's operating system
    has a driver for the tablet (`Timeouts.input`).

    Every method raises:
        ConfigError: A position is outside the screen, or an argument is wrong (a `ValueError`).
        VMTimeoutError: The guest does not read the tablet in time: the click would be lost.
        VMNotRunningError: The VM is not running, or is paused.
    """

    def __init__(self, vm: VM, screen: Screen) -> None:
        super().__init__(vm)
        self._screen = screen

    async def move(self, x: int, y: int) -> None:
        """Move the mouse to a position."""
        point = self._point(x, y)
        async with self._taken():
            await self._move(point)

    async def click(
        self, x: int | None = None, y: int | None = None, *, button: Button = "left", count: int = 1
    ) -> None:
        """Click at a position, or at the mouse's current position.

        Args:
            x: Pixels from the left edge; pass both `x` and `y`, or neither.
            y: Pixels from the upper edge.
            button: `"left"`, `"middle"` or `"right"`.
            count: The number of clicks: 2 is a double click.
        """
        press, point = _press(button), self._point(x, y, optional=True)
        check_integer("count", count, 1, 10, "1 for a click, 2 for a double click, at most 10")
        async with self._taken():
            await self._move(point)
            for _ in range(count):
                async with self._held(press):
                    pass

    async def double_click(
        self, x: int | None = None, y: int | None = None, *, button: Button = "left"
    ) -> None:
        """Click twice. See `click()`."""
        await self.click(x, y, button=button, count=2)

    async def down(self, *, button: Button = "left") -> None:
        """Press a button and leave it down."""
        press = _press(button)
        async with self._taken():
            with self.releasing([press]):
                await self._send(press)

    async def up(self, *, button: Button = "left") -> None:
        """Release a button."""
        press = _press(button)
        with self.releasing([press]):
            async with self._taken():
                await self._send(*released([press]))

    async def drag(
        self,
        start_x: int,
        start_y: int,
        end_x: int,
        end_y: int,
        *,
        button: Button = "left",
        duration: float = 0.5,
    ) -> None:
        """Press a button at one position, move to another position, release the button there.

        Args:
            start_x: Start, in pixels from the left edge.
            start_y: Start, in pixels from the upper edge.
            end_x: End, in pixels from the left edge.
            end_y: End, in pixels from the upper edge.
            button: See `click()`.
            duration: Seconds from the start to the end.
        """
        press = _press(button)
        check_seconds("duration", duration)
        start, end = self._point(start_x, start_y), self._point(end_x, end_y)
        async with self._taken():
            await self._place(end)  # check the end before the mouse moves
            await self._move(start)
            async with self._held(press):
                for step in range(1, STEPS + 1):
                    x, y = (
                        a + round((b - a) * step / STEPS) for a, b in zip(start, end, strict=True)
                    )
                    await self._move((x, y))
                    await asyncio.sleep(duration / STEPS)

    async def scroll(self, clicks: int, *, x: int | None = None, y: int | None = None) -> None:
        """Turn the wheel. QEMU's tablet has no horizontal wheel: hold down Shift instead.

        Args:
            clicks: Clicks of the wheel: positive to scroll down, negative to scroll up.
            x: Move to this position first; pass both `x` and `y`, or neither.
            y: See `x`.
        """
        advice = "clicks of the wheel, positive to scroll down, negative to scroll up, such as 3"
        check_integer("clicks", clicks, -1000, 1000, advice)
        point = self._point(x, y, optional=True)
        turn = button_event("wheel-down" if clicks > 0 else "wheel-up", down=True)
        async with self._taken():
            await self._move(point)
            for _ in range(abs(clicks)):
                await self._send(turn, *released([turn]))
                await asyncio.sleep(PACE)

    @contextlib.asynccontextmanager
    async def _taken(self) -> AsyncIterator[None]:
        """Wait for this call's turn, then until the guest reads the tablet."""
        async with self._turn:
            await self._wait_taken()
            yield

    async def _wait_taken(self) -> None:
        patience = self.vm.config.timeouts.input
        waiting = False
        try:
            async with asyncio.timeout(patience):
                while not await self._is_taken():
                    if not waiting:
                        logger.info("waiting until the guest reads the tablet")
                        waiting = True
                    await asyncio.sleep(POLL)
        except TimeoutError:
            error = VMTimeoutError(
                f"the guest of {self.vm.config.vm_id} did not read the tablet within {patience:g} "
                "s, so mouse events would be lost: firmware, boot loaders and guests without a "
                "driver for USB tablets do not read it.",
                hint="Wait until the operating system runs, or use the keyboard.",
                seconds=patience,
            )
            raise self.running().troubles.explain(error) from None

    async def _is_taken(self) -> bool:
        run = await self.taking_input()
        # After a reset QEMU still reports the tablet's state before the reset.
        in_control = run.boot.last.state.reaches(BootState.OPERATING_SYSTEM)
        return in_control and await run.peripherals.input.tablet_taken()

    def _point(self, x: object, y: object, *, optional: bool = False) -> Point:
        """Check a position against the last screenshot, if there was one, and return it."""
        if optional and x is None and y is None:
            return ()
        point = tuple(_whole(name, value) for name, value in (("x", x), ("y", y)))
        if self._screen.last_size is not None:
            _check_within(point, self._screen.last_size)
        return point

    async def _place(self, point: Point) -> list[InputEvent]:
        size = await self._screen.size()
        _check_within(point, size)
        # The last pixel must be the end of the axis: the guest maps this end to its last pixel.
        x, y = (round(pixel * AXIS / (end - 1)) for pixel, end in zip(point, size, strict=True))
        return [position("x", x), position("y", y)]

    async def _move(self, point: Point) -> None:
        if point:
            await self._send(*await self._place(point))

    @contextlib.asynccontextmanager
    async def _held(self, press: InputEvent) -> AsyncIterator[None]:
        """Hold a button down during the block; release it afterwards, however the block ends."""
        with self.releasing([press]):
            await self._send(press)
            await asyncio.sleep(PACE)
            yield
            await self._send(*released([press]))
            await asyncio.sleep(PACE)

    async def _send(self, *events: InputEvent) -> None:
        await (await self.taking_input()).peripherals.input.send(events)


def _press(button: str) -> InputEvent:
    names = get_args(Button)
    if button not in names:
        raise ConfigError(f"button={shown(button)} is wrong: pass one of {', '.join(names)}.")
    return button_event(button, down=True)


def _whole(name: str, value: object) -> int:
    """Check a number of pixels. Libraries pass NumPy's integers, and models write 100.0."""
    pixels = -1
    if isinstance(value, float) and value.is_integer():
        pixels = int(value)
    elif isinstance(value, SupportsIndex) and not isinstance(value, bool):
        pixels = operator.index(value)
    if pixels < 0:
        raise ConfigError(
            f"{name}={shown(value)} is not on the screen: pass a whole number of pixels, from 0 to "
            "the screen's size minus 1."
        )
    return pixels


def _check_within(point: Point, size: tuple[int, int]) -> None:
    for name, pixel, end in zip("xy", point, size, strict=True):
        if not 0 <= pixel < end:
            raise ConfigError(
                f"{name}={shown(pixel)} is not on the screen: pass a whole number of pixels, "
                f"from 0 to {end - 1}; the last screenshot is {size[0]}x{size[1]}."
            )
