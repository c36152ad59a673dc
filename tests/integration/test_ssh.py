"""Commands against an OpenSSH server of this host, for cases that no guest's server has."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import (
    CommandFailedError,
    CommandTimeoutError,
    ConfigError,
    ConnectionLostError,
)
from smolvm_async.controls.commands.commands import Commands
from smolvm_async.controls.commands.processes import Processes
from smolvm_async.controls.ssh.execution import SSHTransport
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.login import Access, make_key_pair
from smolvm_async.foundation.locking import poll
from tests.integration.ssh_server import link_with, ssh_servers

pytestmark = pytest.mark.anyio

Serve = Callable[[int], Link]
PATIENCE = 20  # seconds


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[[int], Access]]:
    """Start servers with a bound on sessions."""
    with ssh_servers(tmp_path) as start:
        yield start


@pytest.fixture
def serve(start_server: Callable[[int], Access]) -> Serve:
    """Start a server with a bound on sessions, and return a link to it."""
    return lambda sessions: link_with(start_server(sessions))


class Guest(Commands, Processes):
    """The host, as if it were a guest."""

    def __init__(self, link: Link) -> None:
        self.link = link

    async def _transport(self, feature: str) -> SSHTransport:
        return SSHTransport(self.link)

    def _require(self, feature: str) -> None:
        pass


@pytest.fixture
async def guest(serve: Serve) -> AsyncIterator[Guest]:
    """The host, with a server that allows a few sessions."""
    link = serve(3)
    yield Guest(link)
    link.close()


async def test_only_the_known_host_key_is_accepted(start_server: Callable[[int], Access]) -> None:
    access = start_server(10)
    link, wary = (
        link_with(expected)
        for expected in (access, access._replace(host_key=make_key_pair().public))
    )
    await Guest(link).run("true")  # the server listens
    assert await link.connect() is True
    assert await wary.connect() is False
    link.close()
    wary.close()


@pytest.mark.parametrize("sessions", [1, 10])
async def test_a_servers_bound_on_sessions_is_learnt(serve: Serve, sessions: int) -> None:
    link = serve(sessions)
    guest = Guest(link)
    results = await asyncio.gather(*(guest.run(f"echo {n}", timeout=60) for n in range(60)))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(60)]
    link.close()


async def test_a_server_that_allows_none_is_told(serve: Serve) -> None:
    link = serve(0)
    with pytest.raises(ConnectionLostError, match="refuses sessions"):
        await Guest(link).run("true")
    link.close()


@pytest.mark.parametrize("sessions", [1, 10])
async def test_a_cancelled_command_is_killed_and_gives_its_session_back(
    serve: Serve, sessions: int
) -> None:
    link = serve(sessions)
    guest = Guest(link)
    await guest.run("true")
    for steps in range(40):  # the session is being opened, or open
        running = asyncio.ensure_future(guest.run(f"exec sleep 471{sessions}", timeout=None))
        for _ in range(steps):
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert (await guest.run(f"pgrep -fx 'sleep 47[1]{sessions}'")).stdout == ""
    link.close()


@pytest.mark.parametrize("sessions", [1, 3])
async def test_a_command_is_killed_in_time_though_all_sessions_are_taken(
    serve: Serve, sessions: int
) -> None:
    link = serve(sessions)
    guest = Guest(link)
    running = [
        asyncio.ensure_future(guest.run(f"echo begun; exec sleep 472{sessions}", timeout=1.5))
        for _ in range(sessions + 2)
    ]
    for command in running:
        with pytest.raises(CommandTimeoutError) as caught:
            await command
        assert caught.value.stdout == "begun\n"
    assert (await guest.run(f"pgrep -fx 'sleep 47[2]{sessions}'")).stdout == ""
    link.close()


async def test_the_time_of_a_stream_begins_with_its_session(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = serve(1)
    guest = Guest(link)

    async def texts() -> list[str]:
        async with guest.run_stream("echo in time", timeout=PATIENCE) as lines:
            # The user's own profile may complain.
            return [line.text async for line in lines if line.stream == "stdout"]

    async with await guest.spawn("echo begun; cat") as first:
        assert await first.stdout.readline() == b"begun\n"
        waiting = asyncio.ensure_future(texts())
        while not link._sessions._waiting:
            await asyncio.sleep(0.01)
        loop, clock = asyncio.get_running_loop(), asyncio.get_running_loop().time
        monkeypatch.setattr(loop, "time", lambda: clock() + 2 * PATIENCE)
        first.close_input()
        assert await first.wait() == 0
    assert await waiting == ["in time"]
    with pytest.raises(CommandTimeoutError):
        async with guest.run_stream("echo x; sleep 4713", timeout=0.5) as lines:
            assert [line.text async for line in lines] == ["x"]
    link.close()


@pytest.mark.parametrize(
    "arguments",
    [
        {"command": "echo \ud800"},
        {"command": "true", "env": {"A": "\ud800"}},
        {"command": "true", "input": "\ud800"},
    ],
)
async def test_what_cannot_be_sent_is_refused_at_once(serve: Serve, arguments: Any) -> None:
    with pytest.raises(ConfigError, match="lone surrogate"):
        await Guest(serve(1)).run(**arguments)


async def test_bytes_of_file_names_arrive_as_they_were(serve: Serve) -> None:
    link = serve(1)
    odd = os.fsdecode(b"\xff\xfe")
    command = f"cat; printf %s $ODD '{odd}'"
    result = await Guest(link).run(command, env={"ODD": odd}, input=odd, text=False)
    assert result.stdout == b"\xff\xfe" * 3
    result = await Guest(link).run(f"printf %s {odd}", shell="login", text=False)
    assert result.stdout == b"\xff\xfe"
    link.close()


@pytest.mark.parametrize(
    ("command", "quoted"),
    [
        ("echo why; echo told >&2; false", "stderr: told"),
        ("echo why; false", "stdout: why"),
        ("false", "It wrote no output."),
    ],
)
async def test_the_error_of_a_command_quotes_its_output(
    serve: Serve, command: str, quoted: str
) -> None:
    link = serve(1)
    with pytest.raises(CommandFailedError) as failed:
        await Guest(link).run(command, check=True)
    assert str(failed.value).endswith(f"ended with exit code 1.\n{quoted}")
    link.close()


async def test_a_process_is_talked_to_while_it_runs(guest: Guest, tmp_path: Path) -> None:
    odd = "'$(id)\n\t\\x"
    command = 'while read -r line; do echo "$line in $PWD"; echo "$ODD" >&2; done; exit 7'
    process = await guest.spawn(command, env={"ODD": odd}, cwd=str(tmp_path))
    async with process:
        for word in ("first", "second"):
            await process.write(f"{word}\n")
            assert await process.stdout.readline() == f"{word} in {tmp_path}\n".encode()
        process.close_input()
        assert await process.stderr.read() == f"{odd}\n{odd}\n".encode()
        assert (await process.stdout.read(), await process.wait()) == (b"", 7)
    await process.terminate()  # does nothing now


async def test_a_process_ends_with_its_block_unless_it_is_detached(
    guest: Guest, tmp_path: Path
) -> None:
    mark = secrets.token_hex(8)
    command = f"exec -a {mark} sleep 1000"
    async with await guest.spawn(f"bash -c '{command} & wait'") as process:
        assert await poll(lambda: running_as(mark), PATIENCE)
    assert process.exit_code is not None
    assert await poll(lambda: not running_as(mark), PATIENCE)
    async with await guest.spawn(f"bash -c '{command}'", detached=True) as process:
        assert await poll(lambda: running_as(mark), PATIENCE)
    assert (await guest.run("echo free")).stdout == "free\n"
    assert running_as(mark)
    await process.kill()
    assert await poll(lambda: not running_as(mark), PATIENCE)


def running_as(name: str) -> bool:
    """Return whether a process runs whose first argument is this name."""
    found = subprocess.run(["pgrep", "-f", f"^{name}"], stdout=subprocess.DEVNULL)
    return found.returncode == 0


async def test_a_process_gets_the_signals_that_it_is_sent(guest: Guest) -> None:
    for send, caught in (("terminate", b"TERM"), ("kill", None)):
        script = "trap 'echo TERM; exit 3' TERM; echo up; while :; do sleep 0.05; done"
        async with await guest.spawn(script) as process:
            assert await process.stdout.readline() == b"up\n"
            await getattr(process, send)()
            code = await process.wait()
            assert code == (3 if caught else -9)
            assert (await process.stdout.read()).split() == ([caught] if caught else [])
    async with await guest.spawn("true", cwd="/nowhere") as process:
        assert await process.wait() == 126


async def test_unread_output_makes_a_process_wait(guest: Guest) -> None:
    """Fill what the two ends keep, then see that all of it comes, in order."""
    size = 64 << 20
    async with await guest.spawn(f"seq 1 9999999 | head -c {size}") as process:
        await asyncio.wait([asyncio.ensure_future(process.wait())], timeout=1)
        assert process.exit_code is None, "the output does not fit into the buffers"
        kept, block = 0, b"-"
        while block:
            block = await process.stdout.read(1 << 20)
            kept += len(block)
        assert (kept, await process.wait()) == (size, 0)


async def test_a_terminal_has_a_size_and_no_echo_of_variables(guest: Guest) -> None:
    secret = "a b\n" * 2000 + "\x03\x04\r\x11 ü'end"
    command = 'stty size; printf %s "$ODD" | sha256sum; read -r line; stty size; tty; exit 5'
    opening = guest.open_terminal(100, 30, command=command, env={"ODD": secret})
    async with await opening as terminal:
        assert await terminal.stdout.readline() == b"30 100\r\n"
        digest = hashlib.sha256(secret.encode()).hexdigest()
        assert await terminal.stdout.readline() == f"{digest}  -\r\n".encode()
        await terminal.resize(33, 11)
        await terminal.write("echoed\n")
        rest = await terminal.stdout.read()
        assert rest.startswith(b"echoed\r\n11 33\r\n/dev/"), rest
        assert await terminal.wait() == 5


async def test_a_terminal_passes_on_ctrl_c(guest: Guest) -> None:
    command = "trap 'echo caught; exit 9' INT; echo up; while :; do sleep 0.05; done"
    async with await guest.open_terminal(command=command) as terminal:
        await terminal.stdout.readuntil(b"up\r\n")
        await terminal.write(b"\x03")
        await terminal.stdout.readuntil(b"caught\r\n")
        assert await terminal.wait() == 9


async def test_a_terminal_has_a_login_shell(guest: Guest) -> None:
    async with await guest.open_terminal(term="vt100") as terminal:
        await terminal.write("shopt -q login_shell; echo $? $((6 * 7)) $TERM; exit 4\n")
        await terminal.stdout.readuntil(b"0 42 vt100\r\n")
        assert await terminal.wait() == 4


async def test_a_lost_connection_ends_a_process(guest: Guest) -> None:
    async with await guest.spawn("echo up; sleep 1000") as process:
        await process.stdout.readline()
        guest.link.abort()
        for waiting in (process.stdout.read(), process.wait()):
            with pytest.raises(ConnectionLostError):
                await waiting


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("spawn", {"command": ""}),
        ("spawn", {"command": "true", "cwd": b"/"}),
        ("spawn", {"command": "true", "detached": 1}),
        ("open_terminal", {"columns": 0}),
        ("open_terminal", {"term": "a b\n"}),
    ],
)
async def test_wrong_arguments_of_processes_are_refused(
    guest: Guest, method: str, arguments: Any
) -> None:
    with pytest.raises(ConfigError, match=f"{[*arguments][-1]}="):
        await getattr(guest, method)(**arguments)


async def test_a_list_is_a_program_and_starts_in_a_directory(guest: Guest) -> None:
    words = ["printf", r"%s\n", "a b", "", "'$HOME'\n"]
    assert (await guest.run(words, cwd="/")).stdout == "a b\n\n'$HOME'\n\n"
    for shell in ("raw", "login"):
        assert (await guest.run("pwd", shell=shell, cwd="/usr", env={"A": "b"})).stdout == "/usr\n"
        assert (await guest.run("pwd", shell=shell, cwd="/none")).exit_code == 126
