"""The guest's keyboard and tablet, as QEMU's input events."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from smolvm_async.errors import MonitorError, VMNotRunningError, VMTimeoutError
from smolvm_async.foundation.rpc import rpc
from smolvm_async.qemu.events import Event
from smolvm_async.qemu.monitor import Monitor

InputEvent = dict[str, Any]  # QMP's InputEvent

AXIS = 32767  # the end of QEMU's absolute axes (INPUT_EVENT_ABS_MAX in its ui/input.h)
FIRST_LOOK, LAST_LOOK = 0.0005, 0.02  # seconds between two looks whether the guest has read
# Intel 8042: its status register, and there: data for the processor, and that it is the mouse's.
STATUS_PORT, OUTPUT_FULL, FROM_MOUSE = 0x64, 0x01, 0x20


def key(qcode: str, down: bool) -> InputEvent:
    """A key is pressed or released."""
    return {"type": "key", "data": {"down": down, "key": {"type": "qcode", "data": qcode}}}


def button(name: str, down: bool) -> InputEvent:
    """A mouse button is pressed or released; QEMU's wheel is buttons too."""
    return {"type": "btn", "data": {"down": down, "button": name}}


def position(axis: Literal["x", "y"], value: int) -> InputEvent:
    """The tablet's pen is at a place from 0 to `AXIS`."""
    return {"type": "abs", "data": {"axis": axis, "value": value}}


def pressed(events: Iterable[InputEvent]) -> list[InputEvent]:
    """Those of a series of events that press what none of them releases again."""
    held: dict[tuple[str, str], InputEvent] = {}
    for event in events:
        if event["type"] in ("key", "btn"):
            what = (event["type"], str(event["data"].get("key") or event["data"]["button"]))
            held.pop(what, None)
            if event["data"]["down"]:
                held[what] = event
    return [*held.values()]


def released(events: Sequence[InputEvent]) -> list[InputEvent]:
    """What releases all that `events` press, the last one first."""
    return [{**event, "data": {**event["data"], "down": False}} for event in reversed(events)]


class Input:
    """Sends input events over the monitor."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._stroke = asyncio.Lock()
        self._pauses = 0
        self._resumed = asyncio.Event()
        self._resumed.set()

    def on_event(self, event: Event) -> None:
        """To be called with every event of QEMU."""
        if event.name == "STOP":
            self._pauses += 1
            self._resumed.clear()
        elif event.name == "RESUME":
            self._resumed.set()

    def close(self) -> None:
        """The run is over: nothing waits any more until the guest is resumed."""
        self._resumed.set()

    @rpc
    async def send(self, events: Sequence[InputEvent]) -> None:
        """Send input events, which the guest's devices get at once and together.

        Raises:
            MonitorError: If QEMU refuses them.
            VMNotRunningError: If QEMU has ended, or the guest is paused.
        """
        try:
            await self._monitor.execute("input-send-event", {"events": [*events]})
        except MonitorError as error:
            if not self._resumed.is_set():
                raise VMNotRunningError("The guest is paused, and takes no input.") from error
            raise

    @rpc
    async def strike(self, events: Sequence[InputEvent], patience: float) -> None:
        """Send what happens on the keyboard, and wait until the guest has read it.

        The keyboard holds 16 bytes, some five keys, and drops what comes while it is full. So each
        stroke, of whichever process, waits until the guest has read the last one.

        Args:
            events: At most 16 bytes' worth: three keys, down and up.
            patience: Seconds for the guest to read what the keyboard holds.

        Raises:
            VMTimeoutError: If it does not.
            MonitorError, VMNotRunningError: See `send()`.
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
                    if not self._resumed.is_set():
                        raise VMNotRunningError("The guest is paused, and reads no input.")
                    await asyncio.sleep(look)
                    look = min(2 * look, LAST_LOOK)
        except TimeoutError:
            raise VMTimeoutError(
                f"The guest has not read its keyboard for {patience:g} s: it hangs, or has not "
                "come so far yet. What it has not read stays in the keyboard.",
                seconds=patience,
            ) from None

    @rpc
    def post(self, events: Sequence[InputEvent]) -> None:
        """Deliver input events, and wait for nothing."""
        self._monitor.begin(self.deliver(events))

    async def deliver(self, events: Sequence[InputEvent]) -> None:
        """Send input events after all that was sent before; to a paused guest once it is resumed.

        Nothing is raised if QEMU ends, or hangs.
        """
        while True:
            pauses = self._pauses
            await self._resumed.wait()
            try:
                async with self._stroke:
                    return await self.send(events)
            except (MonitorError, VMNotRunningError):
                if pauses == self._pauses:
                    return

    async def _keyboard_idle(self) -> bool:
        """Whether the guest has read all that the keyboard sent: its controller holds nothing."""
        line = f"i/b {STATUS_PORT:#x}"
        answer = await self._monitor.execute("human-monitor-command", {"command-line": line})
        try:
            status = int(answer.split("=")[1], 16)
        except (IndexError, ValueError):
            message = f"QEMU did not understand {line!r}: {answer!r}"
            raise MonitorError(message, command="human-monitor-command") from None
        return not status & OUTPUT_FULL or bool(status & FROM_MOUSE)

    @rpc
    async def tablet_taken(self) -> bool:
        """Whether the guest has a driver for the tablet; else QEMU has no use for its events."""
        mice = await self._monitor.execute("query-mice")
        return any(mouse["current"] and mouse["absolute"] for mouse in mice)
