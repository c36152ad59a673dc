"""Commands, terminals and files of a guest from the command line, in processes of their own."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import random
import re
import select
import shlex
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM
from smolvm_async.foundation.locking import poll
from smolvm_async.images.build.debian.builder import build_debian
from tests.conftest import processes
from tests.integration.trees import digest_tree, make_tree

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
    for info in await AsyncSmolVM.list(data_dir=data_dir):  # of a test that failed
        await (await AsyncSmolVM.from_id(info.vm_id, data_dir=data_dir)).delete()


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
    given, whole, missing, unknown, option = await asyncio.gather(
        cli(vm, "exec", "shared", "cat", given=content),
        cli(vm, "exec", *place, "--", "sh", "-c", script),
        cli(vm, "exec", "-i", "shared", "no-such-program"),
        cli(vm, "exec", "no-such-vm", "true"),
        cli(vm, "exec", "--timeout", "5", "shared", "true"),
    )
    assert given == (0, content, b"")
    assert whole == (137, b"/tmp\n", b"a  b\n")
    assert missing[0] == 127
    assert unknown[0] == 125
    assert b"smolvm-async list" in unknown[2]
    assert (option[0], b"no option --timeout" in option[2]) == (2, True)


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


async def test_directories_are_copied_both_ways_with_a_progress_bar(
    vm: AsyncSmolVM, screen: Screen, tmp_path: Path
) -> None:
    make_tree(tmp_path / "tree", 50)
    process = await screen.start(words(vm, "cp", str(tmp_path / "tree"), "shared:/srv/"))
    await screen.shows(b"uploading tree")
    await screen.shows(b"shared:/srv/tree\r\n")
    assert await process.wait() == 0
    code, output, errors = await cli(vm, "cp", "shared:/srv/tree", f"{tmp_path}/back", "--json")
    assert (code, errors) == (0, b"")
    assert json.loads(output) == {"vm_id": "shared", "path": f"{tmp_path}/back"}
    assert digest_tree(tmp_path / "back") == digest_tree(tmp_path / "tree")


SERVER = """
import socket
server = socket.create_server(("", 8000))
print("up", flush=True)
while True:
    with server.accept()[0] as connection:
        connection.sendall(b"hello")
"""


async def test_a_port_is_forwarded_until_it_is_removed(vm: AsyncSmolVM) -> None:
    async with await vm.spawn(f"exec python3 -Sc {shlex.quote(SERVER)}") as server:
        assert await server.stdout.readline() == b"up\n"
        code, output, _ = await cli(vm, "forward", "shared", "8000", "--json")
        assert code == 0
        (forward,) = json.loads(output)
        port = forward["host_port"]
        assert await received(port) == b"hello"
        shown = f"127.0.0.1:{port} -> shared:8000\n".encode()
        assert await cli(vm, "forward", "shared") == (0, shown, b"")
        removed = await cli(vm, "forward", "shared", f"--host-port={port}", "--remove")
        assert removed == (0, b"No ports of shared are forwarded.\n", b"")
        with pytest.raises(ConnectionRefusedError):
            await received(port)


async def received(port: int) -> bytes:
    """Return all that a server of this host sends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(PATIENCE):
        content = await reader.read()
    writer.close()
    return content


async def test_ssh_and_scp_use_the_configuration(vm: AsyncSmolVM, tmp_path: Path) -> None:
    code, config, _ = await cli(vm, "ssh-config", "shared")
    assert code == 0
    (tmp_path / "config").write_bytes(config)
    (tmp_path / "sent").write_bytes(random.randbytes(100_000))
    options = ("-F", str(tmp_path / "config"))
    assert await done("ssh", *options, "shared", "hostname; exit 7") == (7, b"shared\n")
    for source, target in ((tmp_path / "sent", "shared:/srv/scp"), ("shared:/srv/scp", tmp_path)):
        assert (await done("scp", *options, str(source), str(target)))[0] == 0
    assert (tmp_path / "scp").read_bytes() == (tmp_path / "sent").read_bytes()


async def test_a_pause_is_told_and_commands_wait_for_its_end(vm: AsyncSmolVM) -> None:
    events = await start(vm, "events", "shared", "--follow", "--json")
    async with asyncio.timeout(PATIENCE):
        assert json.loads(await events.stdout.readline())["state"] == "ready"
        assert await cli(vm, "pause", "shared") == (0, b"shared is paused.\n", b"")
        assert json.loads(await events.stdout.readline())["name"] == "STOP"
        waiting = await start(vm, "exec", "shared", "echo", "on")
        told = await waiting.stderr.readline()
        assert b"shared is paused. To go on: smolvm-async resume shared --data-dir" in told
        resumed = await cli(vm, "resume", "shared", "--json")
        assert (resumed[0], json.loads(resumed[1])["status"]) == (0, "running")
        assert json.loads(await events.stdout.readline())["name"] == "RESUME"
        assert await waiting.communicate() == (b"on\n", b"")
        events.send_signal(signal.SIGINT)
        await events.communicate()
        assert events.returncode == 130


def has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], (), (), 0)[0])


def is_empty(directory: Path) -> bool:
    return not processes(directory)


async def ids(vm: AsyncSmolVM) -> list[str]:
    return [info.vm_id for info in await AsyncSmolVM.list(data_dir=vm._vm.config.data_dir)]


async def done(*line: str) -> tuple[int | None, bytes]:
    """Execute a program of this host; return its exit code and its output."""
    process = await asyncio.create_subprocess_exec(*line, stdout=PIPE)
    async with asyncio.timeout(PATIENCE):
        output, _ = await process.communicate()
    return process.returncode, output


SMALL = ("--memory=256", "--accel=tcg")


async def test_run_starts_a_vm_for_one_command(vm: AsyncSmolVM) -> None:
    script = "pwd; cat; echo $A >&2; exit 41"
    place = ("-e", "A=7", "-w", "/tmp")
    one, whole, (_, name, _), late = await asyncio.gather(
        cli(vm, "run", *SMALL, "--rm", "--", "python3", "-c", "print(1)"),
        cli(vm, "run", *SMALL, *place, "-i", "--", "sh", "-c", script, given=b"\0\xff"),
        cli(vm, "run", *SMALL, *place, "-d", "--keep", "--", "sh", "-c", script),
        cli(vm, "run", *SMALL, "--ttl=4", "--", "sleep", "4711"),
    )
    assert (late[0], b"it is deleted 4 s (--ttl)" in late[2]) == (125, True)
    assert one == (0, b"1\n", b"")
    assert whole == (41, b"/tmp\n\0\xff", b"7\n")
    apart = name.decode().strip()
    code, log, _ = await cli(vm, "logs", "--follow", "--source=owner", apart)
    assert code == 0
    assert log.startswith(b"/tmp\n7\nThe command has ended with exit code 41.\n")
    assert (await cli(vm, "delete", "--yes", apart))[0] == 0
    assert await ids(vm) == ["shared"]


async def test_a_command_of_run_ends_by_ctrl_c_and_its_vm_with_it(vm: AsyncSmolVM) -> None:
    process = await start(vm, "run", *SMALL, "--", "sh", "-c", "echo up; exec sleep 4711")
    async with asyncio.timeout(PATIENCE):
        assert await process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert await process.communicate() == (b"", b"")
    assert process.returncode == 130
    assert await ids(vm) == ["shared"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rm", "--keep"], b"either --rm or --keep"),
        (["-d", "-t", "--", "true"], b"either --tty or --detach"),
        (["--json", "--", "true"], b"either --json or a COMMAND"),
        (["-w", "/tmp"], b"pass a COMMAND, too"),
        (["-d", "--memory=1"], b"--memory 1 is less than"),
    ],
)
async def test_wrong_options_of_run_are_told(
    vm: AsyncSmolVM, arguments: list[str], words: bytes
) -> None:
    code, output, errors = await cli(vm, "run", *arguments)
    assert (code, output) == (2, b"")
    assert words in b" ".join(errors.replace("│".encode(), b"").split())


async def test_a_vm_in_the_background_outlives_its_terminal_and_not_its_owner(
    vm: AsyncSmolVM, screen: Screen
) -> None:
    (code, output, errors), process = await asyncio.gather(
        cli(vm, "run", "-d", *SMALL),
        screen.start(words(vm, "run", "-d", "--os=linux", "--id=apart", *SMALL)),
    )
    name = output.decode().strip()
    assert (code, output) == (0, f"{name}\n".encode())
    assert f"Starting {name}.".encode() in errors
    await screen.shows(b"\napart\r\n")
    async with asyncio.timeout(PATIENCE):
        assert await process.wait() == 0
    screen.close()
    assert await cli(vm, "exec", "apart", "echo", "on") == (0, b"on\n", b"")
    last = await start(vm, "exec", "apart", "sh", "-c", "echo up; exec sleep 4711")
    assert await last.stdout.readline() == b"up\n"
    data_dir = vm._vm.config.data_dir
    owners = {info.vm_id: info.owner for info in await AsyncSmolVM.list(data_dir=data_dir)}
    for vm_id in (name, "apart"):
        owner = os.pidfd_open(owners[vm_id] or 0)
        assert processes(data_dir / vm_id)
        if vm_id == name:
            assert (await cli(vm, "delete", name))[0] == 0
        else:
            signal.pidfd_send_signal(owner, signal.SIGKILL)
        assert await poll(partial(has_ended, owner), PATIENCE)
        assert await poll(partial(is_empty, data_dir / vm_id), PATIENCE)
        os.close(owner)
    _, errors = await last.communicate()
    assert (last.returncode, b"apart crashed: its owner" in errors) == (125, True)
    assert await ids(vm) == ["shared", "apart"]
    assert (await cli(vm, "prune"))[1] == b"Removed apart.\n"


async def test_a_terminal_needs_a_terminal(vm: AsyncSmolVM) -> None:
    code, _, errors = await cli(vm, "shell", "shared")
    assert (code, b"not a terminal" in errors) == (2, True)


async def test_the_facts_about_a_guest_are_shown(vm: AsyncSmolVM) -> None:
    code, output, _ = await cli(vm, "info", "shared", "--json")
    facts = json.loads(output)
    assert (code, facts["vm_id"], facts["os_id"]) == (0, "shared", "debian")
    assert facts["disks"][0]["mount_point"] == "/"
    code, output, _ = await cli(vm, "info", "shared")
    lines = output.decode().splitlines()
    assert code == 0
    assert "os id: debian" in lines
    assert re.fullmatch(r"disk /: [\d.]+ \w+ of [\d.]+ \w+, ext4", lines[-1])
