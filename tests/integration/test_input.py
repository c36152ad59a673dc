"""Keyboard and mouse, in a guest that reports its input on its serial console."""

from __future__ import annotations

import asyncio
import random
import re
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from smolvm_async import (
    AsyncSmolVM,
    BootState,
    BootStateChanged,
    ConfigError,
    ConnectionLostError,
    Reset,
    Status,
    VMTimeoutError,
)
from smolvm_async.controls.desktop.keys import KEYS
from smolvm_async.controls.desktop.layouts import LAYOUTS, strokes
from stand_in import build_stand_in
from tests.conftest import BOOT, closed_since, console_shows, descriptors, vm_in
from tests.layouts import generate, xkb
from tests.unit.test_layouts import characters

pytestmark = pytest.mark.anyio

EV_KEY, EV_REL, EV_ABS = 1, 2, 3  # linux/input-event-codes.h
X, Y, WHEEL, FINE_WHEEL = 0, 1, 8, 11
LEFT, RIGHT, MIDDLE = 272, 273, 274
AXIS = 32767
LETTERS = string.ascii_letters + string.digits + " .,;-_/()"

Event = tuple[int, int, int]  # type, code, value


class Guest:
    """A VM whose guest reports its input: `INPUT device type code value`.

    Attributes:
        vm: The VM.
        events: Its events since this object was made.
    """

    def __init__(self, vm: AsyncSmolVM) -> None:
        self.vm = vm
        self.events = vm.events()
        self._text = ""
        self._more = asyncio.Event()

    async def listen(self) -> None:
        """Gather the whole console, which may be more than the VM keeps of it."""
        async for text in self.vm.follow_console():
            self._text += text
            self._more.set()

    async def reported(self, device: str, until: Event) -> list[Event]:
        """Return the events of a device since the last call, up to an event."""
        end = f"INPUT {device} {until[0]} {until[1]} {until[2]}\n"
        try:
            async with asyncio.timeout(BOOT):
                while end not in self._text.replace("\r", ""):
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            pytest.fail(f"the guest did not report {end!r} after {self._text[-1000:]!r}")
        before, _, self._text = self._text.replace("\r", "").partition(end)
        lines = re.findall(rf"INPUT {device} (\d+) (\d+) (-?\d+)\n", before)
        events = [(int(kind), int(code), int(value)) for kind, code, value in lines]
        return [event for event in events if event[0] in (EV_KEY, EV_REL, EV_ABS)]

    async def keys(self) -> list[tuple[int, int]]:
        """Return the keys since the last call: evdev number, and whether it went down."""
        await self.vm.keyboard.press("F12")
        events = await self.reported("keyboard", (EV_KEY, 88, 0))
        assert events.pop() == (EV_KEY, 88, 1)
        return [(code, value) for _, code, value in events]

    async def pointer(self) -> list[Event]:
        """Return the tablet's events since the last call; the mouse is then at 7, 7.

        QEMU merges moves that the guest has not read, and the guest reports no move to the place
        where the mouse is. So wait for the report of each move.
        """
        width, height = (await self.vm.screenshot()).size
        events: list[Event] = []
        for place in (9, 7):
            await self.vm.mouse.move(place, place)
            x, y = (round(place * AXIS / (size - 1)) for size in (width, height))
            events += await self.reported("tablet", (EV_ABS, Y, y))
            assert events.pop() == (EV_ABS, X, x)
        return events


@asynccontextmanager
async def heard(guest: Guest) -> AsyncIterator[Guest]:
    """Listen to a guest."""
    listening = asyncio.create_task(guest.listen())
    try:
        await guest.keys()  # from here on nothing is lost
        yield guest
    finally:
        listening.cancel()
    assert (await guest.vm.stop()).graceful


@pytest.fixture(scope="module")
def shared_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
async def guests(shared_data_dir: Path) -> AsyncIterator[tuple[Guest, Guest]]:
    """A guest that has rebooted, and a clone that has not; tests leave them as they are."""
    disk = await build_stand_in(desktop=True)
    async with vm_in(shared_data_dir, disk, timeouts={"boot": BOOT, "input": BOOT}) as vm:
        guest = Guest(vm)
        await console_shows(vm, "STAND-IN: ready")
        await vm.wait_for("ready", timeout=BOOT)
        async with vm.fork(1) as (clone,):
            with pytest.raises(ConnectionLostError, match="the guest was reset"):
                await vm.run("reboot; exec sleep 1000", timeout=None)
            await console_shows(vm, "STAND-IN: ready", times=2)
            await vm.wait_for("ready", timeout=BOOT)
            async with heard(guest) as there, heard(Guest(clone)) as other:
                yield there, other


@pytest.fixture
def there(guests: tuple[Guest, Guest]) -> Guest:
    return guests[0]


def text_of(events: list[tuple[int, int]], layout: str) -> str:
    """Return the text that a Linux program with this layout reads from the keys."""
    keyboard = xkb.Keyboard(*generate.LAYOUTS[layout])
    text = ""
    for code, value in events:
        if value:
            text += keyboard.down(code)
        else:
            keyboard.up(code)
    return text


def pressed(*codes: int) -> list[tuple[int, int]]:
    """Return events of keys that go down in this order, and up in the reverse order."""
    return [*((code, 1) for code in codes), *((code, 0) for code in reversed(codes))]


async def test_what_is_typed_is_shown_after_a_reboot(there: Guest) -> None:
    # It stands first: later tests press Scroll Lock, which stops the guest's screen.
    before = await there.vm.screenshot()
    await there.vm.keyboard.type("it is shown\n")
    shown = await there.vm.wait_for_screen(changed=before, stable=1)
    assert (shown.width, shown.height) == (1280, 800)
    await there.keys()


async def test_a_guest_that_reboots_goes_on(there: Guest) -> None:
    seen = there.events.pending()
    assert any(isinstance(event, Reset) and event.guest for event in seen)
    changes = [event for event in seen if isinstance(event, BootStateChanged)]
    up = [BootState.OPERATING_SYSTEM, BootState.READY]
    assert [change.state for change in changes] == [*up, BootState.FIRMWARE, *up]
    assert "guest-reset" in changes[2].evidence
    assert "STAND-IN: rebooting" in there.vm.console_log()
    assert len(set(re.findall(r"STAND-IN: boot_id=(\S+)", there.vm.console_log()))) == 2
    assert there.vm.status is Status.RUNNING
    files = (await there.vm.run("ls /tmp", BOOT, check=True)).stdout.splitlines()
    assert len({name.split("\\")[-2] for name in files}) == 1, "only those of the command itself"


@pytest.mark.skipif(bool(xkb.missing()), reason=xkb.missing())
async def test_every_key_and_every_character_arrives(there: Guest) -> None:
    keyboard = there.vm.keyboard
    others = [key for key in KEYS if key.qcode != "f12"]
    for key in others:
        await keyboard.press(key.names[0])
    assert await there.keys() == [event for key in others for event in pressed(key.evdev)]
    for layout in ("us", "de", "fr", "gb"):
        assert layout in LAYOUTS
        keyboard.layout = layout
        text = characters(layout)
        await keyboard.type(text)
        assert text_of(await there.keys(), layout) == text
    await keyboard.press("ctrl+alt+delete")
    assert await there.keys() == pressed(29, 56, 111)
    await keyboard.press("AltGr+KeyQ", layout="us")
    assert await there.keys() == pressed(100, 16)
    await keyboard.down("shift")
    await keyboard.press("b", layout="us")
    await keyboard.up("shift")
    assert await there.keys() == [(42, 1), *pressed(48), (42, 0)]
    await keyboard.press("x", hold=0.5, layout="us")  # a real keyboard would repeat it
    assert await there.keys() == pressed(45)
    with pytest.raises(ConfigError, match="SNOWMAN"):
        await keyboard.type("not one of these keys: \N{SNOWMAN}")
    assert await there.keys() == []
    keyboard.layout = "us"


async def test_several_processes_lose_no_key_of_each_other(
    there: Guest, shared_data_dir: Path
) -> None:
    vm_id, before = there.vm.vm_id, descriptors()
    others = [await AsyncSmolVM.from_id(vm_id, data_dir=shared_data_dir) for _ in range(4)]
    texts = ("@" * 100, "{" * 100, "q" * 100, "[" * 100)
    async with asyncio.TaskGroup() as group:
        for other, text in zip(others, texts, strict=True):
            group.create_task(other.keyboard.type(text, layout="de"))
    text = text_of(await there.keys(), "de")
    assert sorted(text) == sorted("".join(texts))
    await others[0].keyboard.down("alt")
    await there.vm.pause()
    await others[0].detach()
    await there.vm.resume()
    assert await there.keys() == pressed(56)
    for other in others[1:]:
        await other.detach()
    await closed_since(before)


async def test_two_guests_are_typed_into_at_once(guests: tuple[Guest, Guest]) -> None:
    async def check(guest: Guest, number: int) -> None:
        text = "".join(random.Random(number).choices(LETTERS, k=500))
        await guest.vm.keyboard.type(text, layout="us")
        seen = await guest.keys()
        evdev = {key.qcode: key.evdev for key in KEYS}
        wanted = [pressed(*(evdev[code] for code in keys)) for keys in strokes(text, "us")]
        assert seen == [event for stroke in wanted for event in stroke]

    async with asyncio.TaskGroup() as group:
        for number, guest in enumerate(guests):
            group.create_task(check(guest, number))
    other = guests[1]
    await other.pointer()
    await other.vm.mouse.click(0, 0)
    assert len(await other.pointer()) == 4  # this one has not rebooted


async def test_a_click_that_cannot_be_is_refused_at_once(blank_image: Path, data_dir: Path) -> None:
    async with vm_in(data_dir, blank_image, timeouts={"input": 0.5}) as vm:
        for wrong in ((-5, 0), ("a", 0), (5, None), (True, 1), (1.5, 1)):
            with pytest.raises(ConfigError, match=r"^[xy]="):  # at once
                await vm.mouse.click(*wrong)
        with pytest.raises(VMTimeoutError, match="did not read the tablet"):
            await vm.mouse.click(1, 1)
        await vm.stop(timeout=0)


async def test_the_mouse_is_exact(there: Guest) -> None:
    mouse, seen = there.vm.mouse, await there.vm.screenshot()
    right, bottom = seen.width - 1, seen.height - 1
    await there.pointer()

    for x, y, at in (
        (0, 0, (0, 0)),
        (right, 0, (AXIS, 0)),
        (right, bottom, (AXIS, AXIS)),
        (0, bottom, (0, AXIS)),
        (seen.width // 2, seen.height // 2, (16396, 16404)),
    ):
        await mouse.click(x, y)
        events = await there.pointer()
        assert events == [
            (EV_ABS, X, at[0]),
            (EV_ABS, Y, at[1]),
            (EV_KEY, LEFT, 1),
            (EV_KEY, LEFT, 0),
        ]
    for button, code in (("left", LEFT), ("middle", MIDDLE), ("right", RIGHT)):
        await mouse.click(button=button)  # type: ignore[arg-type]
        await mouse.down(button=button)  # type: ignore[arg-type]
        await mouse.up(button=button)  # type: ignore[arg-type]
        assert await there.pointer() == 2 * [(EV_KEY, code, 1), (EV_KEY, code, 0)]
    await mouse.move(640.0, 400)  # type: ignore[arg-type]  # as models write
    assert await there.pointer() == [(EV_ABS, X, 16396), (EV_ABS, Y, 16404)]
    await mouse.double_click()
    assert await there.pointer() == 2 * [(EV_KEY, LEFT, 1), (EV_KEY, LEFT, 0)]
    await mouse.drag(100, 50, 700, 500, duration=0.3)
    events = await there.pointer()
    down, up = events.index((EV_KEY, LEFT, 1)), events.index((EV_KEY, LEFT, 0))
    assert (down, up) == (2, len(events) - 1)
    ways = [[value for _, code, value in events[:up] if code == axis] for axis in (X, Y)]
    for way, start, end, size in zip(ways, (100, 50), (700, 500), (right, bottom), strict=True):
        assert (way[0], way[-1]) == (round(start * AXIS / size), round(end * AXIS / size))
        assert way == sorted(way)
        assert len(way) > 5
    await mouse.scroll(3)
    await mouse.scroll(-2, x=20, y=20)
    wheel = [value for kind, code, value in await there.pointer() if (kind, code) == (2, WHEEL)]
    assert (sum(wheel[:3]), sum(wheel)) == (-3, -1)
    for wrong in ((seen.width, 0), (0, seen.height), (-1, 5), (5, -1)):
        with pytest.raises(
            ConfigError, match="is not on the screen: pass a whole number of pixels, from 0 to"
        ):
            await mouse.click(*wrong)
    assert await there.pointer() == []


async def test_the_guest_of_an_mcp_client_gets_its_clicks_and_its_wheel(
    there: Guest, shared_data_dir: Path
) -> None:
    pytest.importorskip("mcp", reason="the extra `mcp` is not installed")
    from tests.integration.test_mcp import create, look, session

    await there.vm.snapshot("desktop")
    async with session(shared_data_dir, "--snapshot", "desktop") as client:
        sandbox = await create(client, snapshot="desktop")
        guest = Guest(await AsyncSmolVM.from_id(sandbox, data_dir=shared_data_dir))
        listening = asyncio.create_task(guest.listen())
        picture = await look(client, "click", sandbox=sandbox, x=100, y=50, button="right")
        width, height = picture.size
        moved = [
            (EV_ABS, X, round(100 * AXIS / (width - 1))),
            (EV_ABS, Y, round(50 * AXIS / (height - 1))),
        ]
        events = await guest.reported("tablet", (EV_KEY, RIGHT, 0))
        assert events == [*moved, (EV_KEY, RIGHT, 1)]
        await look(client, "scroll", sandbox=sandbox, x=100, y=50, direction="up", amount=2)
        for _ in range(2):
            events = await guest.reported("tablet", (EV_REL, FINE_WHEEL, 120))
            assert events == [(EV_REL, WHEEL, 1)]
        drag = {"action": "left_click_drag", "start_coordinate": [0, 0], "coordinate": [100, 50]}
        await look(client, "computer", sandbox=sandbox, action=drag)
        events = await guest.reported("tablet", (EV_KEY, LEFT, 0))
        assert events[:3] == [(EV_ABS, X, 0), (EV_ABS, Y, 0), (EV_KEY, LEFT, 1)]
        assert set(moved) <= set(events)
        listening.cancel()
        await guest.vm.detach()
    await AsyncSmolVM.delete_snapshot("desktop", data_dir=shared_data_dir)


async def test_a_guest_that_does_not_read_its_keyboard_is_told_of(
    blank_image: Path, data_dir: Path
) -> None:
    async with vm_in(data_dir, blank_image, timeouts={"input": 0.2}) as vm:
        with pytest.raises(VMTimeoutError, match=r"has not read its keyboard for 0\.2 s"):
            await vm.keyboard.type("the firmware does not listen yet")
        await vm.stop(timeout=0)
