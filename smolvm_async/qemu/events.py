"""The events of a VM: QEMU's events as classes, and the changes of the boot state."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

from smolvm_async.foundation.fork import this_process
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import running_loop

logger = get_logger(__name__)

BACKLOG = 1024  # events kept for a slow listener; further events replace the oldest


class BootState(StrEnum):
    """The states of a booting guest, in this order.

    LAUNCHING: the host prepares the VM, until QEMU's `cont` lets the processors run.
    FIRMWARE: the processors run the firmware, then the boot loader or the start of the kernel. A
        reset leads back to this state.
    OPERATING_SYSTEM: an operating system has enabled the chipset's ACPI events (it has set PM1_EN,
        which is 0 while firmware and boot loader run), or the guest agent answers.
    READY: the SSH server of the guest answers and accepts our login. If the library cannot log in
        to the guest OS, READY means that the guest agent has answered a ping. Without an agent,
        READY means that the disk was idle for 10 s. `BootStateChanged.evidence` names the reason.
    """

    LAUNCHING = "launching"
    FIRMWARE = "firmware"
    OPERATING_SYSTEM = "operating_system"
    READY = "ready"

    def reaches(self, other: BootState) -> bool:
        """Return whether this state is `other` or a later state."""
        order = list(BootState)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True)
class Event:
    """An event of a VM.

    Attributes:
        name: QEMU's name of the event, such as `SHUTDOWN`.
        timestamp: Seconds since the epoch, measured by QEMU.
        data: QEMU's data, unchanged.
    """

    name: str
    timestamp: float
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BootStateChanged(Event):
    """The VM has entered a boot state. `name` is `BOOT_STATE`, a name that QEMU does not use."""

    NAME: ClassVar[str] = "BOOT_STATE"

    state: BootState = BootState.LAUNCHING
    evidence: str = ""
    elapsed: float = 0.0  # seconds since start()


class _Caused(Event):
    """An event with QEMU's `ShutdownCause`."""

    @property
    def guest(self) -> bool:
        """True if the guest itself was the cause."""
        return bool(self.data.get("guest"))

    @property
    def reason(self) -> str:
        """QEMU's `ShutdownCause`, such as `guest-shutdown`."""
        return str(self.data.get("reason", "unknown"))


class Shutdown(_Caused):
    """QEMU's SHUTDOWN: the machine powers off."""


class Reset(_Caused):
    """QEMU's RESET: the machine restarts, as in a reboot."""


class GuestPanicked(Event):
    """QEMU's GUEST_PANICKED: the guest's kernel panicked."""

    @property
    def action(self) -> str:
        """QEMU's reaction to the panic."""
        return str(self.data.get("action", "unknown"))


class PortChanged(Event):
    """QEMU's VSERPORT_CHANGE: the guest has opened or closed a virtio-serial port."""

    @property
    def port(self) -> str:
        """The port's id on QEMU's command line."""
        return str(self.data.get("id", ""))

    @property
    def open(self) -> bool:
        """True if the port is open now."""
        return bool(self.data.get("open"))


class Trouble(Event):
    """A trouble of the VM, such as a full disk. `name` is `TROUBLE`, a name QEMU does not use.

    The library derives it from QEMU's events and run state; `data` also has QEMU's own data.
    """

    NAME: ClassVar[str] = "TROUBLE"

    @property
    def kind(self) -> str:
        """The kind: `disk` (an access failed), `image` (damaged), `paused`, or QEMU's event."""
        return str(self.data.get("kind", ""))

    @property
    def message(self) -> str:
        """The trouble in plain English, without a full stop."""
        return str(self.data.get("message", ""))

    @property
    def hint(self) -> str:
        """The fix; empty if none is known."""
        return str(self.data.get("hint", ""))

    @property
    def count(self) -> int:
        """The number of QEMU's reports of this trouble. QEMU may leave out some of many."""
        return int(self.data.get("count", 1))

    @property
    def path(self) -> str:
        """The file concerned; empty if there is none."""
        return str(self.data.get("path", ""))

    @property
    def no_space(self) -> bool:
        """True if a disk of the host is full."""
        return bool(self.data.get("nospace"))

    @property
    def status(self) -> str:
        """QEMU's run state if it has stopped the guest's processors, such as `io-error`."""
        return str(self.data.get("status", ""))

    @property
    def stops(self) -> bool:
        """True if the guest's processors stopped; the trouble ends when they run again."""
        return bool(self.data.get("stops"))

    @property
    def key(self) -> str:
        """A text that tells this trouble from the VM's other troubles."""
        return self.message if self.kind == "disk" else self.kind

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.message}{times}.{' ' if self.hint else ''}{self.hint}"


class NetworkDenied(Event):
    """The network policy has refused a destination. `name` is `NETWORK_DENIED`, not QEMU's name.

    At most `DENIALS` events a second are made for each VM; `omitted` counts the others.
    """

    NAME: ClassVar[str] = "NETWORK_DENIED"

    @property
    def protocol(self) -> str:
        """`tcp`, `udp`, `icmp`, or `dns` for a name that was not resolved."""
        return str(self.data.get("protocol", ""))

    @property
    def address(self) -> str:
        """The address that the guest wanted to reach; empty for `dns`."""
        return str(self.data.get("address", ""))

    @property
    def port(self) -> int:
        """The port; 0 if the protocol has no ports."""
        return int(self.data.get("port", 0))

    @property
    def domain(self) -> str:
        """The domain name that the guest had asked for; empty if it used an address."""
        return str(self.data.get("domain", ""))

    @property
    def reason(self) -> str:
        """The reason in plain English, without a full stop."""
        return str(self.data.get("reason", ""))

    @property
    def omitted(self) -> int:
        """The number of denials since the last event that got no event of their own."""
        return int(self.data.get("omitted", 0))

    def __str__(self) -> str:
        place = f"[{self.address}]" if ":" in self.address else self.address
        target = f"{place}:{self.port}" if self.port and place else place
        named = f"{self.domain} ({target})" if self.domain and target else self.domain or target
        reason = f": {self.reason}" if self.reason else ""
        more = f" (and {self.omitted} more)" if self.omitted else ""
        return f"the network policy denied {self.protocol} to {named}{reason}{more}"


TYPES: Mapping[str, type[Event]] = {
    "SHUTDOWN": Shutdown,
    "RESET": Reset,
    "GUEST_PANICKED": GuestPanicked,
    "VSERPORT_CHANGE": PortChanged,
    Trouble.NAME: Trouble,
    NetworkDenied.NAME: NetworkDenied,
}


class Ports:
    """The virtio-serial ports that the guest has open.

    QEMU tells at most one change of a port in a second, and the last one of the second. If a port
    was closed and opened again meanwhile, as by an agent that starts again, only `open` is told.
    """

    def __init__(self) -> None:
        self._open: set[str] = set()

    def complete(self, event: Event) -> list[Event]:
        """Return the event, after the change that QEMU has left out."""
        if not isinstance(event, PortChanged):
            return [event]
        if not event.open:
            self._open.discard(event.port)
        elif event.port in self._open:
            return [replace(event, data={**event.data, "open": False}), event]
        else:
            self._open.add(event.port)
        return [event]


def parse_event(message: Mapping[str, Any]) -> Event:
    """Return the event of a QMP message, as its class in `TYPES` or else as an `Event`."""
    name = str(message["event"])
    stamp = message.get("timestamp", {})
    timestamp = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
    return TYPES.get(name, Event)(name, timestamp, message.get("data", {}))


def event_from_json(values: Mapping[str, Any]) -> Event:
    """Return the event that `dataclasses.asdict` turned into `values`."""
    if values["name"] == BootStateChanged.NAME:
        return BootStateChanged(**{**values, "state": BootState(values["state"])})
    return TYPES.get(values["name"], Event)(**values)


class EventStream:
    """An async iterator over the events for one listener; it ends when the VM ends.

    Attributes:
        listeners: The stream sets these `asyncio.Event`s at each new event and at its end.
    """

    def __init__(self) -> None:
        self._process = this_process()
        self._backlog: deque[Event] = deque(maxlen=BACKLOG)
        self.listeners: weakref.WeakSet[asyncio.Event] = weakref.WeakSet()
        self._closed = False
        self._behind = False

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        running_loop()
        while not self._backlog:
            if self._closed:
                raise StopAsyncIteration
            self._process.check("this stream of events", "Attach to the VM with from_id().")
            news = asyncio.Event()  # it can be waited for in one event loop only
            self.listeners.add(news)
            await news.wait()
        return self._backlog.popleft()

    def put(self, event: Event) -> None:
        """Add an event. If the listener is too far behind, drop its oldest event."""
        if self._closed:
            return
        if len(self._backlog) == BACKLOG and not self._behind:
            self._behind = True
            logger.warning(
                "a listener of events() is %d events behind: the oldest events are dropped", BACKLOG
            )
        self._backlog.append(event)
        self._wake()

    def close(self) -> None:
        """End the stream once the listener has read the waiting events."""
        self._closed = True
        self._wake()

    def pending(self) -> list[Event]:
        """Remove and return all events that have arrived, without waiting for more."""
        events = list(self._backlog)
        self._backlog.clear()
        return events

    def _wake(self) -> None:
        for listener in self.listeners:
            listener.set()


class EventHub:
    """A hub that passes every event to every stream that is still in use."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()

    def subscribe(self) -> EventStream:
        """Return a stream of all events from now on."""
        stream = EventStream()
        self._streams.add(stream)
        return stream

    def publish(self, event: Event) -> None:
        """Add an event to every stream."""
        for stream in list(self._streams):
            stream.put(event)

    def close(self) -> None:
        """End every stream once its listener has read the waiting events."""
        for stream in list(self._streams):
            stream.close()
