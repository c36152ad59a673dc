"""The screen: screenshots, waiting, size, VNC. It shows the firmware, so no guest is needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from computer_use import enter_setup
from smolvm_async import (
    ActionError,
    AsyncSmolVM,
    ConfigError,
    Screenshot,
    Status,
    VMNotRunningError,
    VMTimeoutError,
)
from smolvm_async.agents import Computer
from smolvm_async.qemu import arguments
from tests.conftest import child_named, descriptors, vm_in

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).parents[2] / "examples"
FIRMWARE = 120  # seconds; it takes 5 to 15 until it asks for a key


@pytest.fixture(scope="module")
async def in_setup(
    blank_image: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[AsyncSmolVM]:
    """A VM in the firmware's set-up, for all tests that leave it there: nothing can be booted."""
    async with vm_in(tmp_path_factory.mktemp("setup"), blank_image) as vm:
        await enter_setup(vm)
        yield vm
        await vm.stop(timeout=0)


async def still(vm: AsyncSmolVM) -> Screenshot:
    """Pause the VM once the firmware has drawn something, and return the picture of its screen."""
    while (await vm.wait_for_screen(changed=True, timeout=FIRMWARE)).size == (640, 480):
        pass
    await vm.pause()
    return await vm.screenshot()


async def after(vm: AsyncSmolVM, keys: str) -> Screenshot:
    """Return the picture of the screen once a key has had its effect."""
    before = await vm.screenshot()
    await vm.keyboard.press(keys)
    return await vm.wait_for_screen(changed=before, stable=3, timeout=FIRMWARE)


async def test_the_firmwares_set_up_is_navigated_by_keys_alone(in_setup: AsyncSmolVM) -> None:
    vm = in_setup
    first = await vm.wait_for_screen(stable=3, timeout=FIRMWARE)
    second = await after(vm, "ArrowDown")
    entry = await after(vm, "Down")
    assert len({first, second, entry}) == 3
    await vm.keyboard.press("Up")
    assert await vm.wait_for_screen(like=second, timeout=FIRMWARE) == second
    menu = await after(vm, "Enter")
    assert menu not in (first, second, entry)
    await vm.keyboard.press("Esc")  # out of the menu again
    assert await vm.wait_for_screen(like=second, timeout=FIRMWARE) == second


async def test_a_models_actions_navigate_the_firmware(in_setup: AsyncSmolVM) -> None:
    computer = Computer(in_setup)
    first = (await computer.act({"action": "screenshot"})).screenshot
    key = {"type": "tool_use", "name": "key", "input": {"text": "Down", "repeat": 2}}
    assert (await computer.act(key)).screenshot != first
    up = {"type": "keypress", "keys": ["ARROWUP"]}
    back = await computer.act({"type": "computer_call", "actions": [up, up]})
    assert back.screenshot == first
    width, height = first.size
    zoom = {"action": "zoom", "region": [0, 0, width // 2, height // 2]}
    zoomed = (await computer.act(zoom)).screenshot
    assert zoomed.size == first.size
    assert zoomed != first
    with pytest.raises(ActionError, match=f"x={width} is not on the screen"):
        await computer.act({"type": "click", "x": width, "y": 0, "button": "left"})


async def test_the_computer_use_example_saves_what_it_saw(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    example = await asyncio.create_subprocess_exec(
        *(sys.executable, EXAMPLES / "computer_use.py", "--pictures", tmp_path / "pictures"),
        env=environment,
        stdout=subprocess.PIPE,
    )
    said, _ = await example.communicate()
    assert example.returncode == 0, said
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert len(pictures) >= 6
    assert len({Screenshot.from_png(path.read_bytes()) for path in pictures}) >= 4


async def test_screenshots_at_every_time_of_a_vms_life(blank_image: Path, data_dir: Path) -> None:
    vm = vm_in(data_dir, blank_image)
    with pytest.raises(VMNotRunningError, match="not started"):
        await vm.screenshot()
    async with vm:
        first = await vm.screenshot()  # QEMU says there that nothing has been drawn
        assert (first.width, first.height) == (640, 480)
        assert first.png.startswith(b"\x89PNG")
        assert len(first.pixels) == 640 * 480 * 3
        assert 0 < first.elapsed < 60
        assert abs(first.timestamp - time.time()) < 60
        drawn = await vm.wait_for_screen(changed=first, timeout=FIRMWARE)
        assert (drawn.width, drawn.height) == (1280, 800)  # the default
        await vm.pause()
        assert str(vm.status) == "paused"
        paused = await vm.screenshot()
        assert paused == await vm.screenshot()
        with pytest.raises(VMNotRunningError, match="paused"):
            await vm.keyboard.press("a")
        await vm.resume()
        assert str(vm.status) == "running"
        many = await asyncio.gather(*(vm.screenshot() for _ in range(8)))
        assert {picture.width for picture in many} == {1280}
        assert not list((data_dir / vm.vm_id).glob("*.p*"))
        await vm.stop(timeout=0)
        with pytest.raises(VMNotRunningError, match="is no longer running: it ended by"):
            await vm.screenshot()  # by `quit`, or by SIGKILL if the disk is too busy to flush
    with pytest.raises(VMNotRunningError):
        await vm.screenshot()


async def test_another_process_sees_the_screen_too(blank_image: Path, data_dir: Path) -> None:
    async with vm_in(data_dir, blank_image, resolution=(1920, 1080)) as vm:
        drawn = await still(vm)
        assert drawn.size == (1920, 1080)
        async with await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir) as seen:
            assert await seen.screenshot() == drawn
            assert await seen.wait_for_screen(like=drawn, timeout=0) == drawn
            assert seen.status is Status.PAUSED
            assert [info.status for info in await AsyncSmolVM.list(data_dir=data_dir)] == ["paused"]
            await seen.resume()
        await vm.stop(timeout=0)


async def test_a_second_display_is_named(
    blank_image: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = arguments._display

    def two(*values: Any, usb: bool) -> list[str]:
        return [*real(*values, usb=usb), "-device", "virtio-gpu-pci,id=second,max_outputs=2"]

    monkeypatch.setattr(arguments, "_display", two)
    async with vm_in(data_dir, blank_image) as vm:
        drawn = await still(vm)
        assert await vm.screenshot(display="display") == drawn
        assert await vm.screenshot(display="second", head=1) != drawn
        wrongs: list[dict[str, Any]] = [
            {"display": "third"},
            {"display": ""},
            {"display": "\udcff"},  # QEMU's JSON parser would give up the whole session
            {"head": 1},
            {"head": -1},
            {"display": "second", "head": 2},
        ]
        for wrong in wrongs:
            with pytest.raises(ConfigError, match=next(iter(wrong))):
                await vm.screenshot(**wrong)
        await vm.stop(timeout=0)


async def test_the_screen_has_the_resolution_that_was_asked_for(
    blank_image: Path, data_dir: Path
) -> None:
    async with vm_in(data_dir, blank_image, resolution="3840x2160") as vm:
        drawn = await vm.wait_for_screen(changed=True, timeout=FIRMWARE)
        assert drawn.size == (3840, 2160)
        await vm.stop(timeout=0)


async def test_waiting_for_the_screen(in_setup: AsyncSmolVM) -> None:
    vm = in_setup
    await vm.wait_for_screen(stable=3, timeout=FIRMWARE)
    await vm.pause()  # on a busy host it may still draw
    setup = await vm.screenshot()
    with pytest.raises(VMTimeoutError, match="the screen has not changed"):
        await vm.wait_for_screen(changed=setup, timeout=0.3)
    with pytest.raises(VMTimeoutError, match="must stay unchanged for 5 s"):
        await vm.wait_for_screen(stable=5, timeout=0.3)
    await vm.resume()
    moved = await after(vm, "Down")
    with pytest.raises(VMTimeoutError, match="does not look like"):
        await vm.wait_for_screen(like=setup, timeout=0.3)
    assert await vm.wait_for_screen(like=setup, max_different=0.1, timeout=0) == moved
    assert await vm.wait_for_screen(like=setup, tolerance=255, timeout=0) == moved
    below = (0, setup.height - 80, setup.width, 80)  # the keys that one can press
    assert await vm.wait_for_screen(like=setup, region=below, timeout=0) == moved
    rest = {"menu": (0, 0, setup.width, setup.height - 80)}
    with pytest.raises(VMTimeoutError):
        await vm.wait_for_screen(changed=setup, ignore=rest, timeout=0.3)


WRONG: tuple[tuple[str, dict[str, Any]], ...] = (
    ("has no condition", {}),
    ("changed='yes'", {"changed": "yes"}),
    ("stable=-1", {"stable": -1}),
    ("timeout='soon'", {"stable": 1, "timeout": "soon"}),
    ("stable=True", {"stable": True}),
    ("timeout=1000", {"stable": 1, "timeout": 10**400}),
    ("interval=nan", {"stable": 1, "interval": float("nan")}),
    ("like=b'no picture'", {"like": b"no picture"}),
    ("like='/nowhere.png'", {"like": "/nowhere.png"}),
    ("region=", {"stable": 1, "region": (0, 0, 5000, 5000)}),
    ("region=", {"stable": 1, "region": (0, 0, -1, 5)}),
    ("ignore= covers the whole region", {"stable": 1, "ignore": [(0, 0, 640, 480)]}),
    ("tolerance=256", {"stable": 1, "tolerance": 256}),
    ("max_different=2", {"stable": 1, "max_different": 2}),
)


async def test_what_cannot_be_waited_for_is_refused(blank_image: Path, data_dir: Path) -> None:
    async with vm_in(data_dir, blank_image, resolution="640x480") as vm:
        for message, wanted in WRONG:
            with pytest.raises(ConfigError, match=message):
                await vm.wait_for_screen(**wanted)
        await vm.stop(timeout=0)


def listening(pid: int) -> list[str]:
    """Return the addresses on which a process listens, in hexadecimal, as in /proc/net/tcp."""
    inodes = {link[8:-1] for link in descriptors(pid).values() if link.startswith("socket:[")}
    lines = []
    for family in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and (fields[3] == "0A" or family.startswith("udp")):
                lines.append(fields[1])
    return lines


async def picture_by_vnc(port: int, password: str, directory: Path) -> bytes:
    """Return the picture of Debian's VNC client as a JPEG; empty if the server refuses it."""
    secret, file = directory / "secret", directory / "seen.jpeg"
    obscured = subprocess.run(
        ["tigervncpasswd", "-f"], input=f"{password}\n".encode(), capture_output=True, check=True
    )
    secret.write_bytes(obscured.stdout)
    file.unlink(missing_ok=True)
    client = await asyncio.create_subprocess_exec(
        *("vncsnapshot", "-quiet", "-passwd", secret, f"127.0.0.1:{port - 5900}", file),
        stderr=subprocess.DEVNULL,
    )
    await client.wait()
    return file.read_bytes() if file.exists() else b""


@contextlib.asynccontextmanager
async def forwarded(path: str) -> AsyncIterator[int]:
    """Forward a port to a unix socket, as `ssh -L PORT:PATH` does."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(path)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.skipif(
    not all(map(shutil.which, ("vncsnapshot", "tigervncpasswd"))),
    reason="Debian's VNC client is needed: vncsnapshot, and tigervnc-tools for its passwords",
)
async def test_vnc_takes_its_password_and_listens_nowhere_else(
    blank_image: Path, data_dir: Path, tmp_path: Path
) -> None:
    async with vm_in(data_dir, blank_image, vnc="loopback") as vm:
        qemu = child_named("qemu", vm.vm_id)
        url = urlsplit(await vm.vnc.url())
        assert (url.scheme, url.hostname) == ("vnc", "127.0.0.1")
        assert url.port
        assert url.password
        assert len(url.password) == 8
        assert listening(qemu) == [f"0100007F:{url.port:04X}"]
        assert await picture_by_vnc(url.port, url.password, tmp_path)
        for wrong in ("", url.password[:-1], url.password.swapcase()):
            assert not await picture_by_vnc(url.port, wrong, tmp_path)
        moved = urlsplit(await vm.vnc.start("unix"))
        assert not listening(qemu)
        assert (moved.scheme, moved.path) == ("vnc+unix", f"{data_dir}/{vm.vm_id}/vnc.sock")
        assert moved.password
        assert moved.password != url.password
        async with forwarded(moved.path) as port:
            assert await picture_by_vnc(port, moved.password, tmp_path)
            assert not await picture_by_vnc(port, url.password, tmp_path)
        async with await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir) as seen:
            assert urlsplit(await seen.vnc.url()) == moved
            again = urlsplit(await seen.vnc.start())
            assert listening(qemu) == [f"0100007F:{again.port:04X}"]
        await vm.vnc.stop()
        await vm.vnc.stop()
        assert not listening(qemu)
        assert not Path(moved.path).exists()
        with pytest.raises(ConfigError, match="is off"):
            await vm.vnc.url()
        await vm.stop(timeout=0)


async def test_a_socket_with_too_long_a_path_is_refused(blank_image: Path, tmp_path: Path) -> None:
    place = tmp_path / ("x" * 100)
    async with vm_in(place, blank_image) as vm:
        with pytest.raises(ConfigError, match="longer than the 107 bytes"):
            await vm.vnc.start("unix")
        with pytest.raises(ConfigError, match="is off"):
            await vm.vnc.url()
        assert await vm.vnc.start()
        await vm.stop(timeout=0)


async def test_vnc_is_off_unless_asked_for(blank_image: Path, data_dir: Path) -> None:
    async with vm_in(data_dir, blank_image) as vm:
        with pytest.raises(ConfigError, match="is off"):
            await vm.vnc.url()
        assert not listening(child_named("qemu", vm.vm_id))
        with pytest.raises(ConfigError, match="kind='tcp' is wrong"):
            await vm.vnc.start("tcp")  # type: ignore[arg-type]
        await vm.stop(timeout=0)
