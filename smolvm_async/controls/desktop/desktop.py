"""The desktop: what one does with a guest that one sees, nothing of ours being inside it."""

from __future__ import annotations

from functools import partial

from smolvm_async.controls.desktop.comparison import Box, Boxes, Comparison
from smolvm_async.controls.desktop.condition import ScreenCondition
from smolvm_async.controls.desktop.keyboard import Keyboard
from smolvm_async.controls.desktop.mouse import Mouse
from smolvm_async.controls.desktop.picture import Reference, Screenshot
from smolvm_async.controls.desktop.screen import Screen
from smolvm_async.controls.desktop.vnc import VNC
from smolvm_async.controls.interface import VM
from smolvm_async.foundation.tasks import in_thread


class Desktop:
    """`AsyncSmolVM`'s screen, mouse, keyboard and VNC server.

    Attributes:
        keyboard: See `Keyboard`.
        mouse: See `Mouse`.
        vnc: See `VNC`.
    """

    keyboard: Keyboard
    mouse: Mouse
    vnc: VNC
    _vm: VM
    _screen: Screen

    def _make_controls(self, vm: VM) -> None:
        self._screen = Screen(vm)
        self.keyboard = Keyboard(vm)
        self.mouse = Mouse(vm, self._screen)
        self.vnc = VNC(vm)

    def _control(self, vm: VM) -> None:
        """Control this VM from now on: it may have been attached to anew."""
        for control in (self._screen, self.keyboard, self.mouse, self.vnc):
            control.vm = vm

    async def screenshot(self, *, display: str | None = None, head: int = 0) -> Screenshot:
        """Take a picture of the screen: firmware, boot loader or desktop; also while paused.

        Args:
            display: The id that a display adapter has for QEMU; by default the VM's own.
            head: Which of its outputs.

        Raises:
            ConfigError: There is no such display or head (a `ValueError`).
            HostError: There is no memory for it.
            MonitorError: QEMU hangs: it has not answered within 30 s.
            VMNotRunningError: The VM does not run.
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
        """Wait until the screen is as one wants it; all that is asked for must hold at once.

        Args:
            changed: It differs from this screenshot; `True` means from what it shows now.
            stable: It has not changed for so many seconds.
            like: It looks like this reference: a screenshot, a PIL image, PNG bytes, or the path
                of a picture; of the region's size, or of the screen's.
            region: Look only at this part: left, top, width, height in pixels.
            ignore: Parts to leave out, such as `{"clock": (1200, 770, 80, 30)}`.
            tolerance: By how much (0-255) each channel of a pixel may differ and count as equal.
            max_different: Which share (0-1) of the pixels may differ.
            timeout: Seconds.
            interval: Seconds between two looks.

        Returns:
            The screenshot that satisfied it.

        Raises:
            ConfigError: An argument is wrong, or nothing was asked for (a `ValueError`).
            VMTimeoutError: The screen did not come to that in time; it tells what was seen.
            VMNotRunningError: The VM does not run, or has stopped meanwhile.
        """
        comparison = Comparison(
            region=region, ignore=ignore, tolerance=tolerance, max_different=max_different
        )
        resolution = self._vm.config.resolution
        # In a thread: a reference may have to be read and decoded.
        wanted = await in_thread(
            partial(
                ScreenCondition,
                comparison,
                changed=changed,
                stable=stable,
                like=like,
                resolution=resolution,
            )
        )
        return await self._screen.wait(wanted, timeout=timeout, interval=interval)
