"""The desktop while calls are cancelled or fail, QEMU hangs or ends, or an attached process dies.

No key or button stays down, no caller waits for ever, and the VM goes on.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from smolvm_async import (
    AsyncSmolVM,
    BootState,
    HostError,
    MonitorError,
    SmolVMError,
    Status,
    VMCrashedError,
    VMNotRunningError,
    VMTimeoutError,
)
from smolvm_async.controls.desktop.mouse import Mouse
from smolvm_async.qemu.input import Input
from tests.conftest import child_named, closed_since, descriptors, fill_up, run_of, vm_in
from tests.faults.actors import make
from tests.faults.injection import Counted
from tests.faults.stage import Stage, kill

FOR_EVER = 1 << 30
SOON = 5.0  # seconds for what takes milliseconds
AT_ONCE = 0.5  # seconds; a hanging QEMU would make it wait for 30

Call = Callable[[AsyncSmolVM], Coroutine[Any, Any, object]]


class Wire:
    """The commands that go out to QEMU, in order.

    Attributes:
        commands: Each with its arguments.
    """

    def __init__(self) -> None:
        self.commands: list[tuple[str, dict[str, Any]]] = []

    @property
    def held(self) -> set[str]:
        """The keys and buttons that a guest sees pressed; QEMU refuses a paused one's input."""
        held: set[str] = set()
        paused = False
        for name, arguments in self.commands:
            if name in ("stop", "cont"):
                paused = name == "stop"
            for event in arguments.get("events", ()) if not paused else ():
                data = event["data"]
                if "down" in data:
                    what = data["button"] if "button" in data else data["key"]["data"]
                    (held.add if data["down"] else held.discard)(what)
        return held

    async def shows(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.commands[-5:]}, {self.held} held"
            await asyncio.sleep(0.001)

    async def shows_more(self, than: int) -> None:
        await self.shows(lambda: len(self.commands) > than, "something goes out")

    async def shows_nothing_held(self, vm: AsyncSmolVM, what: str) -> None:
        """Wait until all commands so far are out, and every key that they pressed is released."""
        await run_of(vm).peripherals.input.tablet_taken()  # QEMU answers in turn
        await self.shows(lambda: not self.held, what)
        self.commands.clear()  # `held` goes through all of them


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """The wire of this process's VMs; their guests seem to drive the tablet and read every key."""
    wire = Wire()
    send = QMPClient._do_send

    def listen(self: QMPClient, message: Any) -> None:
        wire.commands.append((str(message["execute"]), dict(message.get("arguments", {}))))
        send(self, message)

    def pretend(kind: type[Input | Mouse], name: str) -> None:
        ask = getattr(kind, name)

        @functools.wraps(ask)
        async def answer(self: Input | Mouse) -> bool:
            await ask(self)
            return True

        monkeypatch.setattr(kind, name, answer)

    monkeypatch.setattr(QMPClient, "_do_send", listen)
    pretend(Input, "_keyboard_idle")
    pretend(Input, "tablet_taken")
    pretend(Mouse, "_is_taken")
    monkeypatch.setattr("smolvm_async.controls.desktop.mouse.PACE", 0.001)
    monkeypatch.setattr("smolvm_async.controls.desktop.mouse.STEPS", 2)
    return wire


@asynccontextmanager
async def seen_by(who: str, image: Path, data_dir: Path) -> AsyncIterator[AsyncSmolVM]:
    """Run a VM, and yield it as its owner has it, or as an attached process has it."""
    async with vm_in(data_dir, image) as vm:
        if who == "owner":
            yield vm
        else:
            async with await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir) as seen:
                yield seen
        if vm.status in (Status.RUNNING, Status.PAUSED):
            await vm.stop(timeout=0)


BY = pytest.mark.parametrize("who", ["owner", "attached"])


class Striker:
    """Strikes at the n-th suspension of any task from now on."""

    def __init__(self) -> None:
        self._left = 0
        self._strike: Callable[[], object] = lambda: None
        asyncio.get_running_loop().set_task_factory(self._make_task)

    def arm(self, point: int, strike: Callable[[], object]) -> None:
        self._left, self._strike = point, strike

    def disarm(self) -> bool:
        """Disarm, and return whether it has struck."""
        left, self._left = self._left, 0
        return left <= 0

    def _make_task(self, loop: asyncio.AbstractEventLoop, inner: Any, **options: Any) -> Any:
        return asyncio.Task(Counted(inner, self._suspended), loop=loop, **options)

    def _suspended(self, _: object) -> None:
        self._left -= 1
        if self._left == 0:
            asyncio.get_running_loop().call_soon(self._strike)


async def press(vm: AsyncSmolVM) -> None:
    await vm.keyboard.press("ctrl+alt+a", hold=0.001)


async def type_text(vm: AsyncSmolVM) -> None:
    await vm.keyboard.type("aB")


async def down(vm: AsyncSmolVM) -> None:
    await vm.keyboard.down("shift+b")


async def button_down(vm: AsyncSmolVM) -> None:
    await vm.mouse.down(button="right")


async def click(vm: AsyncSmolVM) -> None:
    await vm.mouse.click(3, 4, count=2)


async def drag(vm: AsyncSmolVM) -> None:
    await vm.mouse.drag(0, 0, 9, 9, duration=0.003)


async def scroll(vm: AsyncSmolVM) -> None:
    await vm.mouse.scroll(2, x=5, y=5)


async def up(vm: AsyncSmolVM) -> None:
    await vm.keyboard.up("shift+b")


async def button_up(vm: AsyncSmolVM) -> None:
    await vm.mouse.up(button="right")


PRESSING: list[Call] = [press, type_text, click, drag, scroll]
LEAVING_DOWN: list[tuple[Call, Call]] = [(down, up), (button_down, button_up)]


async def struck(
    vm: AsyncSmolVM, call: Call, striker: Striker, point: int, strike: Callable[[Any], object]
) -> tuple[bool, bool]:
    """Strike at an await of a call.

    Returns:
        Whether it struck, and whether the call succeeded. Otherwise the call was cancelled, or the
        guest was paused.
    """
    calling = asyncio.ensure_future(call(vm))
    striker.arm(point, lambda: strike(calling))
    await asyncio.wait([calling], timeout=SOON)
    assert calling.done(), f"{call.__name__} hangs, struck at await {point}"
    error = None if calling.cancelled() else calling.exception()
    assert error is None or "paused" in str(error)
    return striker.disarm(), not calling.cancelled() and error is None


@BY
def test_a_call_that_is_cancelled_at_any_await_leaves_nothing_held_down(
    blank_image: Path,
    data_dir: Path,
    wire: Wire,
    who: str,
    record_property: Callable[[str, object], None],
) -> None:
    cancelled = 0

    async def main() -> None:
        nonlocal cancelled
        striker = Striker()
        async with seen_by(who, blank_image, data_dir) as vm:
            calls = [(call, None) for call in PRESSING]
            for call, release in [*calls, *LEAVING_DOWN]:
                for point in itertools.count(1):
                    hit, good = await struck(vm, call, striker, point, asyncio.Task.cancel)
                    if good and release is not None:
                        assert wire.held
                        await release(vm)
                    await wire.shows_nothing_held(vm, f"{call.__name__} cancelled at {point}")
                    if not hit:
                        break
                    cancelled += 1
            for press, release in LEAVING_DOWN:
                for point in itertools.count(1):
                    await press(vm)
                    hit, _ = await struck(vm, release, striker, point, asyncio.Task.cancel)
                    await wire.shows_nothing_held(vm, f"{release.__name__} cancelled at {point}")
                    if not hit:
                        break
                    cancelled += 1

    asyncio.run(main())
    record_property("injected", ("cancel a call of the desktop", cancelled))


@BY
def test_a_guest_that_is_paused_at_any_await_of_a_call_has_nothing_held_down_once_it_goes_on(
    blank_image: Path,
    data_dir: Path,
    wire: Wire,
    who: str,
    record_property: Callable[[str, object], None],
) -> None:
    paused = 0

    async def main() -> None:
        nonlocal paused
        striker = Striker()
        async with seen_by(who, blank_image, data_dir) as vm:
            for call in PRESSING:
                for point in itertools.count(1):
                    pausing: list[asyncio.Future[None]] = []

                    def pause(_: object, pausing: list[asyncio.Future[None]] = pausing) -> None:
                        pausing.append(asyncio.ensure_future(vm.pause()))

                    hit, _ = await struck(vm, call, striker, point, pause)
                    await asyncio.gather(*pausing)
                    await vm.resume()
                    await wire.shows_nothing_held(vm, f"{call.__name__} paused at {point}")
                    if not hit:
                        break
                    paused += 1

    asyncio.run(main())
    record_property("injected", ("pause in a call of the desktop", paused))


@pytest.mark.anyio
@pytest.mark.parametrize("sent", [False, True])
@BY
async def test_a_call_that_qemu_fails_leaves_nothing_held_down(
    blank_image: Path,
    data_dir: Path,
    wire: Wire,
    who: str,
    sent: bool,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    left = 0
    real = Input.send

    @functools.wraps(real)  # it stays marked as one that an attached process may call
    async def send(self: Input, events: Any) -> None:
        nonlocal left
        left -= 1
        if left or sent:
            await real(self, events)
        if not left:
            raise MonitorError("injected")

    monkeypatch.setattr(Input, "send", send)
    failed = 0
    async with seen_by(who, blank_image, data_dir) as vm:
        for call in PRESSING:
            for nth in itertools.count(1):
                left = nth
                try:
                    await call(vm)
                    break
                except MonitorError:
                    failed += 1
                await wire.shows_nothing_held(vm, f"{call.__name__}, whose message {nth} failed")
    assert failed > 2 * len(PRESSING)
    record_property("injected", ("MonitorError in a call of the desktop", failed))


@pytest.mark.anyio
@BY
async def test_a_guest_that_reads_no_more_has_nothing_held_down(
    blank_image: Path,
    data_dir: Path,
    wire: Wire,
    who: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0

    async def idle(self: Input) -> bool:
        nonlocal looks
        looks -= 1
        return looks > 0

    async with vm_in(data_dir, blank_image, timeouts={"input": 0.01}) as owned:
        vm = owned
        if who == "attached":
            vm = await AsyncSmolVM.from_id(owned.vm_id, data_dir=data_dir)
        monkeypatch.setattr(Input, "_keyboard_idle", idle)
        for call in (press, type_text, down):
            for nth in itertools.count(1):
                looks = nth
                try:
                    await call(vm)
                    break
                except VMTimeoutError:
                    await wire.shows_nothing_held(vm, f"{call.__name__}, unread from {nth} on")
            looks = FOR_EVER
            await up(vm)
        if vm is not owned:
            await vm.detach()


# Other processes


@pytest.mark.anyio
@pytest.mark.parametrize("paused", [False, True])
async def test_what_a_killed_process_held_down_is_released(
    stage: Stage, blank_image: Path, data_dir: Path, wire: Wire, paused: bool
) -> None:
    async with make(str(blank_image), str(data_dir), False) as vm:
        # Before that, the mouse would wait.
        run_of(vm).boot.enter(BootState.OPERATING_SYSTEM, "the test says so")
        before = descriptors()
        stage.call("typist", data_dir)
        typist, _ = await asyncio.to_thread(stage.hear, "holds")
        assert wire.held == {"ctrl", "a", "left"}
        if paused:
            await vm.pause()
        kill(typist)
        if paused:
            await closed_since(before)  # the owner sees that the typist has gone
            assert wire.held
            await vm.resume()
        await wire.shows(lambda: not wire.held, "the owner releases what it held")
        await vm.stop(timeout=0)


@pytest.mark.anyio
async def test_a_process_that_is_killed_as_it_looks_harms_nobody(
    stage: Stage, blank_image: Path, data_dir: Path, wire: Wire
) -> None:
    async with make(str(blank_image), str(data_dir), False) as vm:
        before = descriptors()
        stage.call("viewer", data_dir)
        viewer, _ = await asyncio.to_thread(stage.hear, "views")
        qemu = child_named("qemu")
        os.kill(qemu, signal.SIGSTOP)
        seen = len(wire.commands)
        await wire.shows(lambda: ("screendump", "png") in wanted(wire, seen - 1), "it looks")
        kill(viewer)
        await closed_since(before)  # the owner sees that the viewer has gone
        os.kill(qemu, signal.SIGCONT)
        assert (await vm.screenshot()).size == (640, 480)
        assert (await vm.vnc.url()).startswith("vnc+unix://")
        await vm.vnc.stop()
        await vm.stop(timeout=0)


def wanted(wire: Wire, since: int) -> list[tuple[str, str]]:
    return [(name, str(arguments.get("format"))) for name, arguments in wire.commands[since:]]


# A QEMU that hangs, or ends


async def screenshot(vm: AsyncSmolVM) -> object:
    return await vm.screenshot()


async def look(vm: AsyncSmolVM) -> None:
    with suppress(VMTimeoutError):
        await vm.wait_for_screen(stable=SOON, timeout=0)


async def start_vnc(vm: AsyncSmolVM) -> None:
    await vm.vnc.start()


async def stop_vnc(vm: AsyncSmolVM) -> None:
    await vm.vnc.start()
    await vm.vnc.stop()


async def pause(vm: AsyncSmolVM) -> None:
    await vm.pause()


async def resume(vm: AsyncSmolVM) -> None:
    await vm.resume()


ALL: list[Call] = [screenshot, look, press, type_text, click, start_vnc, stop_vnc, pause, resume]


@pytest.mark.anyio
@BY
async def test_a_call_that_is_cancelled_while_qemu_hangs_returns_at_once(
    blank_image: Path, data_dir: Path, wire: Wire, who: str
) -> None:
    async with seen_by(who, blank_image, data_dir) as vm:
        qemu = child_named("qemu")
        for call in ALL:
            before = len(wire.commands)
            os.kill(qemu, signal.SIGSTOP)
            first, second = (asyncio.ensure_future(call(vm)) for _ in range(2))
            await wire.shows_more(before)
            await cancelled_at_once(first, second)
            os.kill(qemu, signal.SIGCONT)
            await call(vm)  # though the cancelled calls had begun
        await wire.shows_nothing_held(vm, "after all")
        os.kill(qemu, signal.SIGSTOP)
        waiting = [asyncio.ensure_future(vm.screenshot()) for _ in range(2)]
        await asyncio.sleep(0)
        await cancelled_at_once(*waiting)
        await vm.delete()


async def cancelled_at_once(*calls: asyncio.Future[Any]) -> None:
    for call in calls:
        call.cancel()
    _, pending = await asyncio.wait(calls, timeout=AT_ONCE)
    assert not pending
    assert all(call.cancelled() for call in calls)


@pytest.mark.anyio
@BY
async def test_callers_do_not_wait_for_ever_while_qemu_hangs_and_see_no_old_picture_later(
    blank_image: Path,
    data_dir: Path,
    wire: Wire,
    who: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with seen_by(who, blank_image, data_dir) as vm:
        await vm.pause()
        picture = await vm.screenshot()
        qemu = child_named("qemu")
        os.kill(qemu, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr("smolvm_async.qemu.monitor.ANSWER", 0.2)
            began = time.monotonic()
            calls: list[Awaitable[object]] = [vm.screenshot() for _ in range(4)]
            calls += [vm.vnc.start("unix"), vm.vnc.start("unix"), vm.pause(), vm.resume()]
            for error in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(error, MonitorError)
                assert "did not answer" in str(error)
            assert time.monotonic() - began < 1
        os.kill(qemu, signal.SIGCONT)
        assert (await vm.screenshot()).png == picture.png
        await vm.pause()
        assert (await vm.vnc.url()).startswith("vnc+unix://")  # the first one's was carried out
        await vm.vnc.stop()
        await vm.resume()


@pytest.mark.anyio
@BY
async def test_those_who_wait_for_a_picture_hear_that_qemu_has_ended(
    blank_image: Path, data_dir: Path, wire: Wire, who: str
) -> None:
    with pytest.raises(VMCrashedError, match="SIGKILL"):
        async with seen_by(who, blank_image, data_dir) as vm:
            qemu = child_named("qemu")
            os.kill(qemu, signal.SIGSTOP)
            before = len(wire.commands)
            calls = [asyncio.ensure_future(vm.screenshot()) for _ in range(4)]
            calls += [asyncio.ensure_future(vm.wait_for_screen(stable=1)) for _ in range(2)]
            await wire.shows_more(before)
            os.kill(qemu, signal.SIGKILL)
            try:
                await asyncio.wait(calls)
                await asyncio.sleep(SOON)  # a block that is left now would stop the VM
            except asyncio.CancelledError:  # the block's, which has crashed
                await asyncio.wait(calls)
            for call in calls:
                assert isinstance(call.exception(), VMNotRunningError | VMCrashedError)


# What the host lacks


@pytest.mark.anyio
@pytest.mark.parametrize("image_format", ["png", "ppm"])
async def test_a_picture_for_which_there_is_no_memory_is_an_error_and_no_crash(
    blank_image: Path,
    data_dir: Path,
    small_disk: Path,
    image_format: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memfd_create = os.memfd_create

    def create(name: str, flags: int) -> int:
        if name != "screen":
            return memfd_create(name, flags)
        return os.open(small_disk / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)

    with monkeypatch.context() as patch:  # as a memfd is, where memory is not overcommitted
        patch.setattr(os, "memfd_create", create)
        vm = vm_in(data_dir, blank_image, resolution="640x480")
        await vm.start()
    filler = fill_up(small_disk)
    with pytest.raises(HostError, match=r"no memory .*No space left"):
        await run_of(vm).peripherals.screen.dump(image_format, None, 0)
    filler.unlink()
    assert (await vm.screenshot()).size == (640, 480)
    await vm.stop(timeout=0)
    await vm.delete()


@pytest.mark.anyio
@BY
async def test_a_picture_that_cannot_be_read_is_an_error_and_the_next_one_is_good(
    blank_image: Path, data_dir: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pread(fd: int, size: int, offset: int) -> bytes:
        raise MemoryError

    async with seen_by(who, blank_image, data_dir) as vm:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", pread)
            with pytest.raises(MemoryError if who == "owner" else SmolVMError):
                await vm.screenshot()
        assert (await vm.screenshot()).png


@pytest.mark.anyio
async def test_pictures_are_taken_without_a_descriptor_to_spare_here(
    blank_image: Path, data_dir: Path
) -> None:
    async with vm_in(data_dir, blank_image) as vm:
        first = await vm.screenshot()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()) + 1, hard))
        taken = []
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                while True:
                    taken.append(os.dup(0))
            assert (await vm.screenshot()).size == first.size
            with pytest.raises(VMTimeoutError):
                await vm.wait_for_screen(stable=SOON, timeout=0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        await vm.stop(timeout=0)


@pytest.mark.anyio
async def test_a_qemu_without_a_descriptor_to_spare_says_so_and_goes_on(
    blank_image: Path, data_dir: Path
) -> None:
    async with vm_in(data_dir, blank_image) as vm:
        qemu = child_named("qemu")
        limits = resource.prlimit(qemu, resource.RLIMIT_NOFILE)
        resource.prlimit(qemu, resource.RLIMIT_NOFILE, (3, limits[1]))
        refusal = f"screendump.*{os.strerror(errno.EMFILE)}"
        with pytest.raises(MonitorError, match=refusal) as raised:
            await vm.screenshot()
        assert (raised.value.command, raised.value.error_class) == ("screendump", "GenericError")
        with pytest.raises(MonitorError, match=os.strerror(errno.EMFILE)):
            await vm.vnc.start()
        resource.prlimit(qemu, resource.RLIMIT_NOFILE, limits)
        assert (await vm.screenshot()).png
        await vm.vnc.start()
        await vm.vnc.stop()
        await vm.stop(timeout=0)
