"""Keyboard and tablet of the guest, driven by QEMU's input events."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from smolvm_async.errors import MonitorError, VMNotRunningError, VMTimeoutError
from smolvm_async.foundation.rpc import rpc
from smolvm_async.qemu.monitor import Monitor
from smolvm_async.qemu.pauses import Pauses

InputEvent = dict[str, Any]  # QMP's InputEvent

AXIS = 32767  # the maximum of QEMU's absolute axes (INPUT_EVENT_ABS_MAX in ui/input.h)
FIRST_LOOK, LAST_LOOK = 0.0005, 0.02  # seconds between checks whether the guest has read the keys
# Intel 8042: the status register, and its bits "data for the processor" and "from the mouse".
STATUS_PORT, OUTPUT_FULL, FROM_MOUSE = 0x64, 0x01, 0x20


def key(qcode: str, down: bool) -> InputEvent:
    """Return the event for pressing or releasing a key."""
    return {"type": "key", "data": {"down": down, "key": {"type": "qcode", "data": qcode}}}


def button(name: str, down: bool) -> InputEvent:
    """Return the event for pressing or releasing a mouse button (or QEMU's wheel)."""
    return {"type": "btn", "data": {"down": down, "button": name}}


def position(axis: Literal["x", "y"], value: int) -> InputEvent:
    """Return the event that moves the tablet's pen to a position from 0 to `AXIS`."""
    return {"type": "abs", "data": {"axis": axis, "value": value}}


def pressed(events: Iterable[InputEvent]) -> list[InputEvent]:
    """Return the press events that no later event of the series releases."""
    held: dict[tuple[str, str], InputEvent] = {}
    for event in events:
        if event["type"] in ("key", "btn"):
            name = (event["type"], str(event["data"].get("key") or event["data"]["button"]))
            held.pop(name, None)
            if event["data"]["down"]:
                held[name] = event
    return [*held.values()]


def released(events: Sequence[InputEvent]) -> list[InputEvent]:
    """Return the events that release the keys and buttons of `events`, in reverse order."""
    return [{**event, "data": {**event["data"], "down": False}} for event in reversed(events)]


class Input:
    """The guest's input devices, controlled over the monitor."""

    def __init__(self, monitor: Monitor, pauses: Pauses) -> None:
        self._monitor = monitor
        self._pauses = pauses
        self._stroke = asyncio.Lock()

    @rpc
    async def send(self, events: Sequence[InputEvent]) -> None:
        """Send input events. The guest's devices get them immediately and together."""
        try:
            await self._monitor.execute("input-send-event", {"events": [*events]})
        except MonitorError as error:
            if self._pauses.active:
                raise self._paused() from error
            raise

    @rpc
    async def strike(self, events: Sequence[InputEvent], patience: float) -> None:
        """Send keyboard events, and wait until the guest has read them.

        The keyboard holds 16 bytes, about five keys, and drops events while it is full. So each
        stroke, from any process, waits until the guest has read the previous stroke. A stroke has
        at most 16 bytes: three keys, down and up.

        Raises:
            VMTimeoutError: If the guest does not read the keyboard within `patience` seconds.
        """
        async with self._stroke:
            await self._wait_read(patience)
            await self.send(events)
            await self._wait_read(patience)

    async def _wait_read(self, patience: float) -> None:
        look = FIRST_LOOK
        try:
            async with asyncio.timeout(patience):
                while not await self._keyboard_idle():
                    if self._pauses.active:
                        raise self._paused()
                    await asyncio.sleep(look)
                    look = min(2 * look, LAST_LOOK)
        except TimeoutError:
            error = VMTimeoutError(
                f"The guest has not read its keyboard for {patience:g} s: the guest hangs or "
                "is still booting. The keyboard keeps the unread keys.",
                seconds=patience,
            )
            raise self._monitor.explain(error) from None

    def _paused(self) -> VMNotRunningError:
        message = "The guest is paused and does not read input: call resume() first."
        error: VMNotRunningError = self._monitor.explain(VMNotRunningError(message))
        return error

    @rpc
    def post(self, events: Sequence[InputEvent]) -> None:
        """Deliver input events in the background."""
        self._monitor.start_task(self.deliver(events))

    async def deliver(self, events: Sequence[InputEvent]) -> None:
        """Send input events after all earlier strokes. Wait first until a paused guest is resumed.

        Raise nothing if QEMU ends or hangs.
        """
        while True:
            pauses = self._pauses.count
            await self._pauses.until_running()
            try:
                async with self._stroke:
                    return await self.send(events)
            except (MonitorError, VMNotRunningError):
                if pauses == self._pauses.count:
                    return

    async def _keyboard_idle(self) -> bool:
        """Return whether the guest has read all data of the keyboard from its controller."""
        status = await self._monitor.read_port(f"i/b {STATUS_PORT:#x}")
        return not status & OUTPUT_FULL or bool(status & FROM_MOUSE)

    @rpc
    async def tablet_taken(self) -> bool:
        """Return whether the guest has a tablet driver; otherwise QEMU drops tablet events."""
        mice = await self._monitor.execute("query-mice")
        return any(mouse["current"] and mouse["absolute"] for mouse in mice)
