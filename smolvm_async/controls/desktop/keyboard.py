"""The keyboard: a PS/2 keyboard, which every firmware and operating system has a driver for.

QEMU's PS/2 keyboard holds 16 bytes, about five keys, and drops keys without an error when the guest
does not read them fast enough. So typing is paced by the guest and not by a clock: each stroke
waits until the guest has read the last one, sends its keys, and waits until the guest has read
those (`Input.strike()`). A guest that reads nothing for `Timeouts.input` seconds is an error,
because its keys would be lost.

A stroke of `type()` presses and releases its keys in one QMP message, so no other process's keys
can come between. `press()` sends one message for each key, because the keys have to be down
together and for a while. If it fails or is cancelled, the releases are posted (`Input.post()`),
which needs no await.

The order of strokes is kept within this object by a lock, and among the processes that are attached
to a VM by QEMU's side, stroke by stroke.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from smolvm_async.config.checks import check_seconds
from smolvm_async.controls.desktop.layouts import check_layout, chord, strokes
from smolvm_async.controls.interface import VM, Control
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.qemu.input import InputEvent, key, released


class Keyboard(Control):
    """Types into the guest. The guest must have the same keyboard layout, and Caps Lock off.

    A call returns once the guest has read its keys. Calls are served one after another, but the
    strokes of several processes may mix. A call that fails or is cancelled leaves no key down;
    only `down()` does, until `up()`.
    """

    def __init__(self, vm: VM) -> None:
        super().__init__(vm)
        self._layout = "us"
        self._turn = asyncio.Lock()

    @property
    def layout(self) -> str:
        """The guest's keyboard layout: a name in `LAYOUTS`, by default `"us"`."""
        return self._layout

    @layout.setter
    def layout(self, layout: str) -> None:
        self._layout = check_layout(layout)

    async def type(self, text: str, *, layout: str | None = None) -> None:
        r"""Type a text; `\n` is the Enter key, `\t` the Tab key.

        Args:
            text: A text of any length.
            layout: The guest's keyboard layout; by default `self.layout`.

        Raises:
            ConfigError: The layout cannot type a character (a `ValueError`). Nothing was typed.
            VMTimeoutError: The guest does not read its keyboard (`Timeouts.input`).
            VMNotRunningError: The VM is not running, or is paused.
        """
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
            ConfigError: There is no such key (a `ValueError`).
            VMTimeoutError, VMNotRunningError: See `type()`.
        """
        check_seconds("hold", hold)
        downs = self._chord(keys, layout)
        async with self._turn:
            with self.releasing(downs):
                for down in downs:
                    await self._send([down])
                await asyncio.sleep(hold)
                for up in released(downs):
                    await self._send([up])

    async def down(self, keys: str, *, layout: str | None = None) -> None:
        """Press keys and leave them down; QEMU's keyboard does not repeat. See `press()`."""
        downs = self._chord(keys, layout)
        async with self._turn:
            with self.releasing(downs):
                await self._send(downs)

    async def up(self, keys: str, *, layout: str | None = None) -> None:
        """Release keys, the last one first. See `press()`."""
        downs = self._chord(keys, layout)
        with self.releasing(downs):
            async with self._turn:
                await self._send(released(downs))

    def _chord(self, keys: str, layout: str | None) -> list[InputEvent]:
        return _down(chord(keys, self._layout if layout is None else layout))

    async def _send(self, events: Sequence[InputEvent]) -> None:
        patience = self.vm.config.timeouts.input
        await self.taking_input().peripherals.input.strike(events, patience)


def _down(codes: Sequence[str]) -> list[InputEvent]:
    return [key(code, down=True) for code in codes]
