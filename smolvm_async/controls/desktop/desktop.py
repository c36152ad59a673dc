"""Screen, mouse, keyboard and VNC. The guest needs no extra software."""

from __future__ import annotations

from smolvm_async.controls.desktop.comparison import Box, Boxes, Comparison
from smolvm_async.controls.desktop.condition import ScreenCondition
from smolvm_async.controls.desktop.keyboard import Keyboard
from smolvm_async.controls.desktop.mouse import Mouse
from smolvm_async.controls.desktop.picture import Reference, Screenshot
from smolvm_async.controls.desktop.screen import Screen
from smolvm_async.controls.desktop.vnc import VNC
from smolvm_async.controls.interface import VM, Control
from smolvm_async.foundation.tasks import in_thread


class Desktop:
    """`AsyncSmolVM`'s screen, mouse, keyboard and VNC server.

    Attributes:
        keyboard: See `Keyboard`.
        mouse: See `Mouse`.
        vnc: See `VNC`.
    """

    _vm: VM

    def _make_controls(self, vm: VM) -> None:
        self._screen = Screen(vm)
        self.keyboard = Keyboard(vm)
        self.mouse = Mouse(vm, self._screen)
        self.vnc = VNC(vm)

    def _control(self, vm: VM) -> None:
        """Make every control use `vm`: attaching again makes a new object for the VM."""
        for control in vars(self).values():
            if isinstance(control, Control):
                control.vm = vm

    async def screenshot(self, *, display: str | None = None, head: int = 0) -> Screenshot:
        """Take a screenshot of firmware, boot loader or desktop, even while the guest is paused.

        Args:
            display: QEMU's id of a display adapter; by default the VM's own adapter.
            head: The number of an output of this display adapter.

        Raises:
            ConfigError: The display or the head does not exist (a `ValueError`).
            HostError: The host has no memory for the screenshot.
            MonitorError: QEMU did not answer within 30 s.
            VMNotRunningError: The VM is not running.
        """
        return await self._screen.shoot(display=display, head=head)

    async def wait_for_screen(
        self,
        *,
        changed: bool | Screenshot = False,
        stable: float | None = None,
        like: Reference | None = None,
        region: Box | None = None,
        ignore: Boxes = (),
        tolerance: int = 0,
        max_different: float = 0.0,
        timeout: float = 60.0,
        interval: float = 0.1,
    ) -> Screenshot:
        """Wait until the screen meets all passed conditions at the same time.

        Args:
            changed: The screen differs from this screenshot; `True`: from the current screen.
            stable: The screen has not changed for this many seconds.
            like: The screen looks like this reference: a screenshot, a PIL image, PNG bytes, or
                the path of a picture. Its size must be the size of `region` or of the screen.
            region: Compare only this part: left, top, width, height in pixels.
            ignore: Parts to leave out, such as `{"clock": (1200, 770, 80, 30)}`.
            tolerance: Pixels count as equal if no channel differs by more than this value (0-255).
            max_different: The share (0-1) of the pixels that may differ.
            timeout: Seconds to wait.
            interval: Seconds between two screenshots.

        Returns:
            The screenshot that met the conditions.

        Raises:
            ConfigError: An argument is wrong, or there is no condition (a `ValueError`).
            VMTimeoutError: The wait timed out; the message lists the unmet conditions.
            VMNotRunningError: The VM is not running, or stops during the wait.
        """
        comparison = Comparison(
            region=region, ignore=ignore, tolerance=tolerance, max_different=max_different
        )
        resolution = self._vm.config.resolution
        # Use a thread: reading and decoding a reference would block the event loop.
        wanted = await in_thread(ScreenCondition, comparison, changed, stable, like, resolution)
        return await self._screen.wait(wanted, timeout=timeout, interval=interval)
