"""Events, the streams that carry them, and the boot states that are drawn from them."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Mapping
from typing import Any, cast

import pytest

from smolvm_async import (
    BootState,
    BootStateChanged,
    Event,
    EventStream,
    GuestPanicked,
    PortChanged,
    Progress,
    Reset,
    Shutdown,
)
from smolvm_async.qemu.boot import BootTracker
from smolvm_async.qemu.events import BACKLOG, EventHub, Ports, parse_event
from smolvm_async.qemu.pauses import Pauses

pytestmark = pytest.mark.anyio


def message(name: str, **data: object) -> dict[str, Any]:
    stamp = {"seconds": 1_700_000_000, "microseconds": 250_000}
    return {"event": name, "timestamp": stamp, **({"data": data} if data else {})}


def numbered(number: int) -> Event:
    return Event("NUMBER", 0.0, {"number": number})


async def read(stream: EventStream) -> list[Event]:
    """All events of a stream that ends."""
    async with asyncio.timeout(60):
        return [event async for event in stream]


async def first(stream: EventStream) -> Event:
    async with asyncio.timeout(60):
        return await anext(stream)


# QEMU's events


@pytest.mark.parametrize(
    ("name", "data", "kind", "properties"),
    [
        (
            "SHUTDOWN",
            {"guest": True, "reason": "guest-shutdown"},
            Shutdown,
            {"guest": True, "reason": "guest-shutdown"},
        ),
        (
            "SHUTDOWN",
            {"guest": False, "reason": "host-qmp-quit"},
            Shutdown,
            {"guest": False, "reason": "host-qmp-quit"},
        ),
        (
            "RESET",
            {"guest": True, "reason": "guest-reset"},
            Reset,
            {"guest": True, "reason": "guest-reset"},
        ),
        ("RESET", {}, Reset, {"guest": False, "reason": "unknown"}),
        ("GUEST_PANICKED", {"action": "pause"}, GuestPanicked, {"action": "pause"}),
        ("GUEST_PANICKED", {}, GuestPanicked, {"action": "unknown"}),
        (
            "VSERPORT_CHANGE",
            {"id": "agent", "open": True},
            PortChanged,
            {"port": "agent", "open": True},
        ),
        (
            "VSERPORT_CHANGE",
            {"id": "agent", "open": False},
            PortChanged,
            {"port": "agent", "open": False},
        ),
        ("NEW_IN_QEMU_99", {"anything": [1, {"deep": None}]}, Event, {}),
        ("STOP", {}, Event, {}),
    ],
)
async def test_an_event_has_its_type_and_keeps_all_that_qemu_said(
    name: str, data: Mapping[str, Any], kind: type[Event], properties: Mapping[str, Any]
) -> None:
    event = parse_event(message(name, **data))
    assert type(event) is kind
    assert (event.name, event.timestamp, event.data) == (name, 1_700_000_000.25, data)
    for attribute, value in properties.items():
        assert getattr(event, attribute) == value


async def test_an_event_is_a_value() -> None:
    event = parse_event(message("RESET", guest=True, reason="guest-reset"))
    assert event == parse_event(message("RESET", guest=True, reason="guest-reset"))
    with pytest.raises(AttributeError):
        event.name = "SHUTDOWN"  # type: ignore[misc]


# Streams


async def test_every_stream_gets_everything_from_its_subscription_on() -> None:
    hub = EventHub()
    early = hub.subscribe()
    hub.publish(numbered(1))
    late = hub.subscribe()
    hub.publish(numbered(2))
    hub.close()
    assert await read(early) == [numbered(1), numbered(2)]
    assert await read(late) == [numbered(2)]


async def test_a_stream_is_read_to_its_end_after_the_close_and_stays_ended() -> None:
    hub = EventHub()
    stream = hub.subscribe()
    hub.publish(numbered(1))
    hub.close()
    assert await read(stream) == [numbered(1)]
    assert await read(stream) == []


async def test_a_closed_stream_takes_nothing_more() -> None:
    """A VM that starts again is another run; listeners of the first run have heard its end."""
    hub = EventHub()
    stream = hub.subscribe()
    hub.publish(numbered(1))
    hub.close()
    hub.publish(numbered(2))
    assert await read(stream) == [numbered(1)]


async def test_a_listener_that_waits_is_woken_by_an_event_and_by_the_end() -> None:
    hub = EventHub()
    stream = hub.subscribe()
    reading = asyncio.create_task(read(stream))
    for number in range(3):
        await asyncio.sleep(0)
        hub.publish(numbered(number))
    await asyncio.sleep(0)
    assert not reading.done()
    hub.close()
    assert await reading == [numbered(number) for number in range(3)]


async def test_two_readers_of_one_stream_share_it_and_both_end() -> None:
    hub = EventHub()
    stream = hub.subscribe()
    readers = [asyncio.create_task(read(stream)) for _ in range(2)]
    for number in range(6):
        await asyncio.sleep(0)
        hub.publish(numbered(number))
    hub.close()
    shares = await asyncio.gather(*readers)
    together = sorted(event.data["number"] for share in shares for event in share)
    assert together == list(range(6))


async def test_a_cancelled_read_loses_no_event() -> None:
    hub = EventHub()
    stream = hub.subscribe()
    reading = asyncio.create_task(first(stream))
    await asyncio.sleep(0)
    reading.cancel()
    hub.publish(numbered(1))
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await first(stream) == numbered(1)


async def test_a_listener_too_far_behind_loses_the_oldest_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub = EventHub()
    stream, other = hub.subscribe(), hub.subscribe()
    reading = asyncio.create_task(first(other))
    with caplog.at_level(logging.WARNING, logger="smolvm_async"):
        for number in range(BACKLOG):
            hub.publish(numbered(number))
        assert not caplog.records, "a full backlog has lost nothing yet"
        assert await reading == numbered(0)
        hub.publish(numbered(BACKLOG))
        hub.close()
    assert len(caplog.records) == 1, "only the stream that lost something complains"
    assert f"{BACKLOG} events behind" in caplog.text
    assert await read(stream) == [numbered(number) for number in range(1, BACKLOG + 1)]
    assert await read(other) == [numbered(number) for number in range(1, BACKLOG + 1)]


async def test_an_abandoned_stream_is_freed_with_its_backlog() -> None:
    hub = EventHub()
    stream = hub.subscribe()
    gone, kept = weakref.ref(stream), hub.subscribe()
    hub.publish(numbered(1))
    del stream
    gc.collect()
    assert gone() is None
    hub.publish(numbered(2))
    assert await first(kept) == numbered(1)


# Boot states


@pytest.mark.parametrize("state", list(BootState))
async def test_boot_states_are_ordered(state: BootState) -> None:
    order = ["launching", "firmware", "operating_system", "ready"]
    reached = [str(other) for other in BootState if state.reaches(other)]
    assert reached == order[: order.index(state) + 1]


class Boot:
    """A boot that is followed, with all that is told of it."""

    def __init__(self) -> None:
        hub = EventHub()
        self.hub = hub
        self.stream = hub.subscribe()
        self.progress: list[Progress] = []
        self.tracker = BootTracker(hub, Pauses(), self.progress.append)

    def sees(self, name: str, **data: object) -> None:
        """QEMU sends an event."""
        self.tracker.on_event(parse_event(message(name, **data)))

    async def history(self) -> list[tuple[str, str]]:
        """The states that were entered, each with its evidence."""
        self.hub.close()
        events = await read(self.stream)
        changes = [event for event in events if isinstance(event, BootStateChanged)]
        assert len(changes) == len(events)
        assert {change.name for change in changes} <= {"BOOT_STATE"}
        elapsed = [change.elapsed for change in changes]
        assert elapsed == sorted(elapsed)
        assert [step.message for step in self.progress] == [
            f"{change.state}: {change.evidence}" for change in changes
        ]
        return [(str(change.state), change.evidence) for change in changes]


async def test_a_boot_begins_with_launching_and_every_change_is_told() -> None:
    boot = Boot()
    boot.tracker.enter(BootState.FIRMWARE, "cont")
    assert await boot.history() == [("launching", "start() was called"), ("firmware", "cont")]


async def test_an_answer_of_the_guest_makes_it_ready_until_a_reset() -> None:
    boot, no_monitor = Boot(), cast(Any, None)
    probes = 0

    async def probe() -> str | None:
        nonlocal probes
        probes += 1
        if probes == 3:
            boot.sees("RESET", guest=True, reason="guest-reset")  # this answer comes too late
            boot.tracker.enter(BootState.OPERATING_SYSTEM, "ACPI")
        return None if probes == 1 else f"answer {probes}"

    boot.tracker.enter(BootState.OPERATING_SYSTEM, "ACPI")
    watching = asyncio.ensure_future(boot.tracker.watch(no_monitor, probe, guess=False))
    await boot.tracker.wait_for(BootState.READY)
    boot.sees("RESET", guest=True, reason="guest-reset")
    boot.tracker.enter(BootState.OPERATING_SYSTEM, "ACPI")
    await boot.tracker.wait_for(BootState.READY)
    watching.cancel()
    await asyncio.wait([watching])
    told = await boot.history()
    assert [evidence for state, evidence in told if state == "ready"] == ["answer 2", "answer 4"]
    assert [state for state, _ in told].count("firmware") == 2


async def test_other_events_change_no_boot_state() -> None:
    """RTC_CHANGE comes twice in OVMF alone: it is not a sign of an operating system."""
    boot = Boot()
    boot.tracker.enter(BootState.FIRMWARE, "cont")
    for name in ("RTC_CHANGE", "NIC_RX_FILTER_CHANGED", "STOP", "RESUME", "POWERDOWN", "SHUTDOWN"):
        boot.sees(name)
    assert len(await boot.history()) == 2


async def test_waiting_ends_at_the_state_at_a_later_one_or_with_the_vm() -> None:
    boot = Boot()
    tracker = boot.tracker
    waiting = {state: asyncio.create_task(tracker.wait_for(state)) for state in BootState}
    await asyncio.sleep(0)
    tracker.enter(BootState.FIRMWARE, "cont")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    done = {state for state, task in waiting.items() if task.done()}
    assert done == {BootState.LAUNCHING, BootState.FIRMWARE}
    tracker.enter(BootState.OPERATING_SYSTEM, "seen")
    tracker.end()
    reached = await waiting[BootState.OPERATING_SYSTEM]
    assert reached is not None
    assert (reached.state, reached.evidence) == (BootState.OPERATING_SYSTEM, "seen")
    assert await waiting[BootState.READY] is None
    assert await tracker.wait_for(BootState.READY) is None  # at once, after the end
    assert await tracker.wait_for(BootState.FIRMWARE) is not None


async def test_a_state_that_was_reached_counts_though_the_machine_was_reset_at_once() -> None:
    """Both events may arrive before the waiting task runs again."""
    boot = Boot()
    boot.tracker.enter(BootState.FIRMWARE, "cont")
    waiting = asyncio.create_task(boot.tracker.wait_for(BootState.READY))
    await asyncio.sleep(0)
    boot.tracker.enter(BootState.READY, "an answer")
    boot.sees("RESET", guest=True, reason="guest-reset")
    for _ in range(5):
        await asyncio.sleep(0)
    missed = waiting.cancel()
    assert not missed, "ready was entered, and the task that waited for it was not told"


async def test_who_gave_up_waiting_stands_in_nobodys_way() -> None:
    boot = Boot()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await boot.tracker.wait_for(BootState.FIRMWARE)
    patient = asyncio.create_task(boot.tracker.wait_for(BootState.FIRMWARE))
    hasty = asyncio.create_task(boot.tracker.wait_for(BootState.FIRMWARE))
    await asyncio.sleep(0)
    hasty.cancel()
    boot.tracker.enter(BootState.FIRMWARE, "cont")  # before the cancellation is delivered
    reached = await patient
    assert reached is not None
    assert reached.state is BootState.FIRMWARE


async def test_a_port_that_is_told_open_twice_was_closed_in_between() -> None:
    ports = Ports()
    told = [("agent", True), ("parked", True), ("agent", True), ("agent", False), ("agent", True)]
    events = [
        event
        for port, open in told
        for event in ports.complete(parse_event(message("VSERPORT_CHANGE", id=port, open=open)))
    ]
    assert [(event.port, event.open) for event in events if isinstance(event, PortChanged)] == [
        *told[:2],
        ("agent", False),
        *told[2:],
    ]


async def test_a_progress_callback_that_raises_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(progress: Progress) -> None:
        raise RuntimeError("the user's own")

    tracker = BootTracker(EventHub(), Pauses(), broken)
    tracker.enter(BootState.FIRMWARE, "cont")
    assert tracker.last.state is BootState.FIRMWARE
    assert "the user's own" in caplog.text
