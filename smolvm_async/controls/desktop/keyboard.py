"""The keyboard: a PS/2 keyboard, since every firmware and operating system has a driver for PS/2.

QEMU's PS/2 keyboard holds 16 bytes, about five keys, and drops keys without an error when the guest
does not read them fast enough. So the guest sets the pace, not a clock: each stroke waits until the
guest has read the previous stroke, sends its keys, and waits until the guest has read these keys
(`Input.strike()`). If the guest reads nothing for `Timeouts.input` seconds, `strike()` raises an
error, because the keys would be lost.

A stroke of `type()` presses and releases its keys in one QMP message, so no other process can press
keys in between. `press()` sends one message for each key, because the keys must be down together
for a while. If `press()` fails or is cancelled, it posts the releases by `Input.post()`, which
needs no await.

A lock of this object keeps its calls in order. A lock of `Input`, in the VM's owner, runs the
strokes of all attached processes one after another.
"""

from __future__ import annotations

from collections.abc import Sequence

from smolvm_async.config.checks import check_seconds
from smolvm_async.controls.interface import VM, Control
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.qemu.input import InputEvent, key, released


class Keyboard(Control):
    """A keyboard to type into the guest, which must have the same layout, and Caps Lock off.

    A call returns once the guest has read its keys. Calls run one after another, but strokes of
    several processes may alternate. A call that fails or is cancelled leaves no key down. Only
    `down()` leaves keys down, until `up()`.
    """

    def __init__(self, vm: VM) -> None:
        super().__init__(vm)
        self._layout = "us"

    @property
    def layout(self) -> str:
        """The guest's keyboard layout: a name in `LAYOUTS`, by default `"us"`."""
        return self._layout

    @layout.setter
    def layout(self, layout: str) -> None:
        from smolvm_async.controls.desktop.layouts import check_layout

        self._layout = check_layout(layout)

    async def type(self, text: str, *, layout: str | None = None) -> None:
        r"""Type a text; `\n` is the Enter key, `\t` the Tab key.

        Args:
            text: A text of any length.
            layout: The guest's keyboard layout; by default `self.layout`.

        Raises:
            ConfigError: The layout cannot type a character (a `ValueError`). No key was pressed.
            VMTimeoutError: The guest does not read its keyboard (`Timeouts.input`).
            VMNotRunningError: The VM is not running, or is paused.
        """
        from smolvm_async.controls.desktop.layouts import strokes

        typed = await in_thread(strokes, text, self._layout if layout is None else layout)
        async with self._turn:
            for codes in typed:
                await self._send([*_down(codes), *released(_down(codes))])

    async def press(self, keys: str, *, hold: float = 0.0, layout: str | None = None) -> None:
        """Press a key, or several keys together, and release them in reverse order.

        Args:
            keys: Names joined by `+`, such as `"Enter"`, `"ctrl+alt+delete"` or `"Meta+r"`; see
                `smolvm_async.controls.desktop.keys`. A single character is the key that types it.
            hold: Seconds that the keys stay down.
            layout: The guest's keyboard layout; by default `self.layout`.

        Raises:
            ConfigError: The key does not exist (a `ValueError`).
            VMTimeoutError, VMNotRunningError: See `type()`.
        """
        check_seconds("hold", hold)
        downs = self._chord(keys, layout)
        async with self._turn:
            with self.releasing(downs):
                for down in downs:
                    await self._send([down])
                await self.sleep(hold)
                for up in released(downs):
                    await self._send([up])

    async def down(self, keys: str, *, layout: str | None = None) -> None:
        """Press keys and leave them down; QEMU's keyboard does not repeat keys. See `press()`."""
        downs = self._chord(keys, layout)
        async with self._turn:
            with self.releasing(downs):
                await self._send(downs)

    async def up(self, keys: str, *, layout: str | None = None) -> None:
        """Release keys, the last key first. See `press()`."""
        downs = self._chord(keys, layout)
        with self.releasing(downs):
            async with self._turn:
                await self._send(released(downs))

    def _chord(self, keys: str, layout: str | None) -> list[InputEvent]:
        from smolvm_async.controls.desktop.layouts import chord

        return _down(chord(keys, self._layout if layout is None else layout))

    async def _send(self, events: Sequence[InputEvent]) -> None:
        patience = self.vm.config.timeouts.input
        await (await self.taking_input()).peripherals.input.strike(events, patience)


def _down(codes: Sequence[str]) -> list[InputEvent]:
    return [key(code, down=True) for code in codes]
