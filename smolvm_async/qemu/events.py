"""What happens to a VM: QEMU's own events, typed, and the boot states derived from them."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from smolvm_async.foundation.log import get_logger

logger = get_logger(__name__)

BACKLOG = 1024  # events that a listener may be behind before the oldest are dropped


class BootState(StrEnum):
    """How far a guest has come, in this order.

    LAUNCHING: the host prepares; ends when QEMU's `cont` lets the processors run.
    FIRMWARE: the processors run the firmware, then the boot loader, or the kernel's beginning. A
        guest's reset leads back here.
    OPERATING_SYSTEM: an operating system listens to the chipset's ACPI events (PM1_EN is not
        0, as it is through firmware and boot loader), or the guest agent has opened its port.
    READY: a Linux guest's SSH server answers, and lets us in. Of a Windows guest: its agent has
        opened its port; or, without one, the disk has rested for a while.
        `BootStateChanged.evidence` says which it was.
    """

    LAUNCHING = "launching"
    FIRMWARE = "firmware"
    OPERATING_SYSTEM = "operating_system"
    READY = "ready"

    def reaches(self, other: BootState) -> bool:
        """Whether this state is `other` or a later one."""
        order = list(BootState)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True)
class Event:
    """One event.

    Attributes:
        name: QEMU's name for it, such as `SHUTDOWN`.
        timestamp: Seconds since the epoch, as QEMU measured it.
        data: QEMU's data, untouched.
    """

    name: str
    timestamp: float
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BootStateChanged(Event):
    """The VM has entered a boot state; `name` is `BOOT_STATE`, which QEMU does not use."""

    NAME: ClassVar[str] = "BOOT_STATE"

    state: BootState = BootState.LAUNCHING
    evidence: str = ""
    elapsed: float = 0.0  # seconds since start()


class _Caused(Event):
    """An event with QEMU's `ShutdownCause`."""

    @property
    def guest(self) -> bool:
        """Whether the guest itself did it."""
        return bool(self.data.get("guest"))

    @property
    def reason(self) -> str:
        """QEMU's `ShutdownCause`, such as `guest-shutdown`."""
        return str(self.data.get("reason", "unknown"))


class Shutdown(_Caused):
    """QEMU's SHUTDOWN: the machine goes off."""


class Reset(_Caused):
    """QEMU's RESET: the machine starts again, as in a reboot."""


class GuestPanicked(Event):
    """QEMU's GUEST_PANICKED: the guest's kernel gave up."""

    @property
    def action(self) -> str:
        """What QEMU does about it."""
        return str(self.data.get("action", "unknown"))


class PortChanged(Event):
    """QEMU's VSERPORT_CHANGE: the guest has opened or closed a virtio-serial port."""

    @property
    def port(self) -> str:
        """The port's id on QEMU's command line."""
        return str(self.data.get("id", ""))

    @property
    def open(self) -> bool:
        """Whether the guest has it open now."""
        return bool(self.data.get("open"))


TYPES: Mapping[str, type[Event]] = {
    "SHUTDOWN": Shutdown,
    "RESET": Reset,
    "GUEST_PANICKED": GuestPanicked,
    "VSERPORT_CHANGE": PortChanged,
}


def parse_event(message: Mapping[str, Any]) -> Event:
    """One QMP event message → its type; an event that is not known here is a plain `Event`."""
    name = str(message["event"])
    stamp = message.get("timestamp", {})
    timestamp = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
    return TYPES.get(name, Event)(name, timestamp, message.get("data", {}))


def event_to_json(event: Event) -> dict[str, Any]:
    """All of an event, for `event_from_json`."""
    return asdict(event)


def event_from_json(values: Mapping[str, Any]) -> Event:
    """The event that `event_to_json` was given."""
    if values["name"] == BootStateChanged.NAME:
        return BootStateChanged(**{**values, "state": BootState(values["state"])})
    return TYPES.get(values["name"], Event)(**values)


class EventStream:
    """An async iterator of one listener's events; it ends when the VM does.

    Attributes:
        listeners: Each is set when there is another event, or the end.
    """

    def __init__(self) -> None:
        self._backlog: deque[Event] = deque(maxlen=BACKLOG)
        self._news = asyncio.Event()
        self.listeners: weakref.WeakSet[asyncio.Event] = weakref.WeakSet([self._news])
        self._closed = False
        self._behind = False

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        while not self._backlog:
            if self._closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._backlog.popleft()

    def put(self, event: Event) -> None:
        """Add an event; the oldest goes if the listener is too far behind."""
        if self._closed:
            return
        if len(self._backlog) == BACKLOG and not self._behind:
            self._behind = True
            logger.warning("a listener of events() is %d behind; it loses the oldest", BACKLOG)
        self._backlog.append(event)
        self._wake()

    def close(self) -> None:
        """End the stream, once it has been read to its end."""
        self._closed = True
        self._wake()

    def pending(self) -> list[Event]:
        """Take all events that are there, without waiting."""
        events = list(self._backlog)
        self._backlog.clear()
        return events

    def _wake(self) -> None:
        for listener in self.listeners:
            listener.set()


class EventHub:
    """Hands every event to every listener that still exists."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()

    def subscribe(self) -> EventStream:
        """A stream of everything from now on."""
        stream = EventStream()
        self._streams.add(stream)
        return stream

    def publish(self, event: Event) -> None:
        """Hand out one event."""
        for stream in list(self._streams):
            stream.put(event)

    def close(self) -> None:
        """End every stream, once it has been read to its end."""
        for stream in list(self._streams):
            stream.close()
