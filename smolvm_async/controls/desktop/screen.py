"""The screen: take screenshots, and wait until the screen meets a condition."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from smolvm_async.config.checks import check_display, check_seconds
from smolvm_async.controls.desktop.condition import ScreenCondition
from smolvm_async.controls.desktop.picture import Screenshot
from smolvm_async.controls.interface import VM, Control
from smolvm_async.errors import ConfigError, MonitorError, VMTimeoutError
from smolvm_async.foundation.tasks import in_background, in_thread

LOOK = 1.0  # seconds that a screenshot may take, even if less of the timeout is left


class Screen(Control):
    """The guest's screen, and the size of the last screenshot."""

    def __init__(self, vm: VM) -> None:
        super().__init__(vm)
        self.last_size: tuple[int, int] | None = None  # of the last screenshot that the user got

    async def size(self) -> tuple[int, int]:
        """Return width and height of the last screenshot; if there was none, take a screenshot."""
        if self.last_size is not None:
            return self.last_size
        return (await self._shoot("ppm", None, 0)).size

    async def shoot(self, *, display: str | None, head: int) -> Screenshot:
        """See `AsyncSmolVM.screenshot()`."""
        check_display(display, head)
        try:
            picture = await self._shoot("png", display, head)
        except MonitorError as error:
            if display is None and head == 0:
                raise
            raise ConfigError(
                f"display={display!r}, head={head} does not exist: {error}"
            ) from error
        if display is None and head == 0:
            self.last_size = picture.size
        return picture

    async def _shoot(self, image_format: str, display: str | None, head: int) -> Screenshot:
        run, taken, began = await self.in_use(), time.time(), time.monotonic()
        data = await run.peripherals.screen.dump(image_format, display, head)
        make = Screenshot.from_png if image_format == "png" else Screenshot.from_ppm
        elapsed = time.monotonic() - began
        return await in_thread(partial(make, data, timestamp=taken, elapsed=elapsed))

    async def wait(self, wanted: ScreenCondition, *, timeout: float, interval: float) -> Screenshot:
        """See `AsyncSmolVM.wait_for_screen()`."""
        check_seconds("timeout", timeout)
        check_seconds("interval", interval)
        deadline = time.monotonic() + timeout
        while True:
            picture = await self._look(deadline)
            if await in_thread(wanted.seen, picture, time.monotonic()):
                await in_background(getattr, picture, "png")  # encoding takes up to 100 ms
                self.last_size = picture.size
                return picture
            if time.monotonic() >= deadline:
                message = (
                    f"The screen of {self.vm.config.vm_id} did not meet the condition within "
                    f"{timeout:g} s: {wanted.explain()}"
                )
                raise self._explained(VMTimeoutError(message, seconds=timeout))
            await self.sleep(interval)

    async def _look(self, deadline: float) -> Screenshot:
        seconds = max(deadline - time.monotonic(), LOOK)
        try:
            async with asyncio.timeout(seconds):
                return await self._shoot("ppm", None, 0)
        except TimeoutError:
            message = (
                f"no screenshot of {self.vm.config.vm_id} arrived in time: QEMU or the VM's owner "
                "hangs; stop or delete the VM."
            )
            raise self._explained(VMTimeoutError(message, seconds=seconds)) from None

    def _explained(self, error: VMTimeoutError) -> VMTimeoutError:
        return self.running().troubles.explain(error)
