"""The screen: pictures of it, and waiting until it shows something."""

from __future__ import annotations

import asyncio
import time

from smolvm_async.checks import check_seconds, shown
from smolvm_async.controls.control import Control
from smolvm_async.controls.picture import Screenshot
from smolvm_async.controls.wanted import Wanted
from smolvm_async.errors import ConfigError, MonitorError, VMTimeoutError
from smolvm_async.handle import Handle
from smolvm_async.shielding import in_background, in_thread

MAX_HEAD = 15  # QEMU's adapters have at most 16


class Screen(Control):
    """Takes pictures of the guest's screen, one after another."""

    def __init__(self, vm: Handle) -> None:
        super().__init__(vm)
        self._size: tuple[int, int] | None = None

    async def size(self) -> tuple[int, int]:
        """Width and height of the last screenshot; one is taken if there was none."""
        if self._size is None:
            await self._shoot("ppm", None, 0)
        assert self._size is not None
        return self._size

    async def shoot(self, *, display: str | None, head: int) -> Screenshot:
        """See `AsyncSmolVM.screenshot()`."""
        if display is not None and not (isinstance(display, str) and display):
            raise ConfigError(f"display={shown(display)} is wrong: pass the id of a display.")
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head <= MAX_HEAD:
            raise ConfigError(f"head={shown(head)} is wrong: pass a number from 0 to {MAX_HEAD}.")
        try:
            return await self._shoot("png", display, head)
        except MonitorError as error:
            if display is None and head == 0:
                raise
            raise ConfigError(
                f"display={display!r}, head={head} cannot be seen: {error}"
            ) from error

    async def _shoot(self, image_format: str, display: str | None, head: int) -> Screenshot:
        run, taken, began = self.running(), time.time(), time.monotonic()
        data = await run.screen.dump(image_format, display, head)
        make = Screenshot.from_png if image_format == "png" else Screenshot.from_ppm
        picture = make(data, timestamp=taken, elapsed=time.monotonic() - began)
        if display is None and head == 0:
            self._size = picture.width, picture.height
        return picture

    async def wait(self, wanted: Wanted, *, timeout: float, interval: float) -> Screenshot:
        """See `AsyncSmolVM.wait_for_screen()`."""
        check_seconds("timeout", timeout)
        check_seconds("interval", interval)
        deadline = time.monotonic() + timeout
        while True:
            picture = await self._shoot("ppm", None, 0)
            if await in_thread(wanted.seen, picture, time.monotonic()):
                await in_background(getattr, picture, "png")  # it takes up to 100 ms
                return picture
            if time.monotonic() >= deadline:
                raise VMTimeoutError(
                    f"The screen of {self.vm.config.vm_id} did not come to what was waited for "
                    f"within {timeout:g} s: {wanted.explain()}"
                )
            await asyncio.sleep(interval)
