"""Commands, terminals and files of a guest from the command line, in processes of their own."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import random
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from subprocess import PIPE
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM
from smolvm_async.images.build.debian.builder import build_debian

pytestmark = pytest.mark.anyio
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
async def vm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncSmolVM]:
    """A guest for all tests."""
    await build_debian()
    data_dir = tmp_path_factory.mktemp("prompt")
    async with AsyncSmolVM(vm_id="shared", memory=256, accel="tcg", data_dir=data_dir) as vm:
        await vm.run("true", timeout=PATIENCE)
        yield vm


def words(vm: AsyncSmolVM, command: str, *arguments: str) -> list[str]:
    """Return the command line of a command whose options come first."""
    place = f"--data-dir={vm._vm.config.data_dir}"
    return [sys.executable, "-m", "smolvm_async", command, place, *arguments]


async def start(vm: AsyncSmolVM, command: str, *arguments: str) -> Any:
    line = words(vm, command, *arguments)
    return await asyncio.create_subprocess_exec(*line, stdin=PIPE, stdout=PIPE, stderr=PIPE)


async def cli(
    vm: AsyncSmolVM, command: str, *arguments: str, given: bytes = b""
) -> tuple[int, bytes, bytes]:
    """Execute a command; return its exit code, its output and its error output."""
    process = await start(vm, command, *arguments)
    async with asyncio.timeout(PATIENCE):
        stdout, stderr = await process.communicate(given)
    return process.returncode, stdout, stderr


async def test_exec_passes_bytes_and_exit_codes(vm: AsyncSmolVM) -> None:
    content = random.randbytes(300_000)
    place = ("-w", "/tmp", "-e", "TEXT=a  b", "shared")
    script = 'pwd; echo "$TEXT" >&2; kill -9 $$'
    given, whole, missing, unknown = await asyncio.gather(
        cli(vm, "exec", "shared", "cat", given=content),
        cli(vm, "exec", *place, "--", "sh", "-c", script),
        cli(vm, "exec", "-i", "shared", "no-such-program"),
        cli(vm, "exec", "no-such-vm", "true"),
    )
    assert given == (0, content, b"")
    assert whole == (137, b"/tmp\n", b"a  b\n")
    assert missing[0] == 127
    assert unknown[0] == 125
    assert b"smolvm-async list" in unknown[2]


async def test_ctrl_c_ends_the_command_and_not_the_vm(vm: AsyncSmolVM) -> None:
    script = "trap 'echo caught; exit 9' INT; echo up; while :; do sleep 0.1; done"
    process = await start(vm, "exec", "shared", "sh", "-c", script)
    async with asyncio.timeout(PATIENCE):
        assert await process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert await process.stdout.read() == b"caught\n"
        assert await process.wait() == 9
    await _closed(process)
    assert (await vm.run("echo on")).stdout == "on\n"


async def test_a_closed_pipe_ends_the_command_of_exec(vm: AsyncSmolVM) -> None:
    endless, short = await asyncio.gather(
        start(vm, "exec", "shared", "yes"), start(vm, "exec", "shared", "head", "-c1")
    )
    async with asyncio.timeout(PATIENCE):
        assert await endless.stdout.readexactly(4) == b"y\ny\n"
        endless._transport.get_pipe_transport(1).close()
        assert await endless.wait() != 0
        assert await endless.stderr.read() == b"", "no traceback"
        short.stdin.write(b"12")  # and the input stays open
        assert await short.stdout.read() == b"1"
        assert await short.wait() == 0
    for process in (endless, short):
        await _closed(process)
    assert (await vm.run("pgrep yes")).exit_code == 1


async def _closed(process: Any) -> None:
    process._transport.close()
    await asyncio.sleep(0)


class Screen:
    """A terminal in which a command runs."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        os.set_blocking(self.ours, False)  # the event loop of this process serves the VM
        self.settings = termios.tcgetattr(self.theirs)
        self.seen = b""
        self._open = [self.theirs, self.ours]

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def start(self, arguments: list[str]) -> asyncio.subprocess.Process:
        line, theirs = ("setsid", "--ctty", "--wait", *arguments), self.theirs
        return await asyncio.create_subprocess_exec(
            *line, stdin=theirs, stdout=theirs, stderr=theirs
        )

    async def shows(self, text: bytes) -> None:
        """Wait until the terminal has shown this text, after the text of the last call."""
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.ours, readable.set)
        try:
            async with asyncio.timeout(PATIENCE):
                while text not in self.seen:
                    await readable.wait()
                    readable.clear()
                    with suppress(BlockingIOError):
                        self.seen += os.read(self.ours, 4096)
        finally:
            loop.remove_reader(self.ours)
        self.seen = self.seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.ours, text)

    def close(self) -> None:
        """Close both ends, as a window that is closed does."""
        while self._open:
            os.close(self._open.pop())


@pytest.fixture
def screen() -> Iterator[Screen]:
    screen = Screen()
    yield screen
    screen.close()


async def test_a_shell_follows_the_window_and_gives_the_terminal_back(
    vm: AsyncSmolVM, screen: Screen
) -> None:
    screen.resize(100, 30)
    process = await screen.start(words(vm, "shell", "shared"))
    script = b"stty size; until stty size | grep '^20 90'; do sleep 0.1; done; exit 3\n"
    screen.type(script)
    await screen.shows(b"30 100\r\n")
    screen.resize(90, 20)
    await screen.shows(b"20 90\r\n")
    async with asyncio.timeout(PATIENCE):
        assert await process.wait() == 3
    assert termios.tcgetattr(screen.theirs) == screen.settings


async def test_a_terminal_that_is_lost_ends_its_command(vm: AsyncSmolVM, screen: Screen) -> None:
    process = await screen.start(words(vm, "exec", "-it", "shared", "sh", "-c", "cat; sleep 4711"))
    screen.type(b"typed\n")
    await screen.shows(b"typed\r\ntyped\r\n")
    screen.close()
    async with asyncio.timeout(PATIENCE):
        assert await process.wait() != 0
    assert (await vm.run("pgrep -x cat")).exit_code == 1


async def test_a_terminal_needs_a_terminal(vm: AsyncSmolVM) -> None:
    code, _, errors = await cli(vm, "shell", "shared")
    assert (code, b"not a terminal" in errors) == (2, True)
