"""Commands against an OpenSSH server of this host, for cases that no guest's server has."""

from __future__ import annotations

import asyncio
import filecmp
import getpass
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import (
    CommandFailedError,
    CommandTimeoutError,
    ConfigError,
    ConnectionLostError,
    FileTransferError,
)
from smolvm_async.controls.commands.commands import Commands
from smolvm_async.controls.ssh.execution import SSHTransport
from smolvm_async.controls.ssh.files import Files
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.login import Access, make_key_pair
from smolvm_async.qemu.pauses import Pauses
from tests.integration.trees import digest_tree, make_tree

pytestmark = pytest.mark.anyio

CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {directory}/host
AuthorizedKeysFile {directory}/authorized
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
MaxSessions {sessions}
Subsystem sftp internal-sftp
"""

Serve = Callable[[int], Link]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[[int], Access]]:
    """Start servers with a bound on sessions."""
    servers = []

    def start(sessions: int) -> Access:
        key, host_key = make_key_pair(), make_key_pair()
        Path("/run/sshd").mkdir(exist_ok=True)
        (tmp_path / "host").write_bytes(host_key.private)
        (tmp_path / "host").chmod(0o600)
        (tmp_path / "authorized").write_text(key.public)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = CONFIG.format(port=port, directory=tmp_path, sessions=sessions)
        (tmp_path / "config").write_text(config)
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", tmp_path / "config"])
        servers.append(server)
        return Access(port, getpass.getuser(), key.private.decode(), host_key.public)

    yield start
    for server in servers:
        server.terminate()
        server.wait()


@pytest.fixture
def serve(start_server: Callable[[int], Access]) -> Serve:
    """Start a server with a bound on sessions, and return a link to it."""
    return lambda sessions: link_with(start_server(sessions))


def link_with(access: Access) -> Link:
    async def known() -> Access:
        return access

    return Link("host", known, Pauses())


class Guest(Commands, Files):
    """The host, as if it were a guest."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def _reach(self) -> Link:
        return self._link

    async def _transport(self) -> SSHTransport:
        return SSHTransport(self._link)

    def _require(self, feature: str) -> None:
        pass


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


async def test_the_time_of_a_stream_begins_with_its_session(serve: Serve) -> None:
    link = serve(1)
    guest = Guest(link)
    first = asyncio.ensure_future(guest.run("sleep 1.5"))
    while (await guest.run("true")).exit_code:
        pass  # the first has its session
    async with guest.run_stream("sleep 0.5; echo in time", timeout=1.2) as lines:
        assert [line.text async for line in lines] == ["in time"]
    await first
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


# File names of every kind, and the target of a link: bytes that are neither UTF-8 nor harmless.
NAMES = [
    b"caf\xe9",
    b"\xff\n\x1b[31m",
    b"-rf *",
    b"'\"$(x) \\",
    b"\xe4\xb8\xad" * 85,  # 255 bytes
    b"\xff" * 255,
]


def odd_tree(root: Path) -> None:
    names = [os.fsdecode(name) for name in NAMES]
    for directory in names:
        (root / directory).mkdir(parents=True)
        for name in names:
            (root / directory / name).write_bytes(os.fsencode(name))
        (root / directory / "link").symlink_to(os.fsdecode(b"to/\xe9\n"))


async def test_file_names_of_any_bytes_go_and_come_the_same(serve: Serve, tmp_path: Path) -> None:
    link = serve(10)
    files = Guest(link)
    odd_tree(tmp_path / "tree")
    told: list[str] = []
    target = os.fsdecode(bytes(tmp_path) + b"/guest/caf\xe9")
    await files.upload_file(
        tmp_path / "tree", target, on_progress=lambda step: told.append(step.message)
    )
    back = await files.download_file(
        target, tmp_path / "back", on_progress=lambda step: told.append(step.message)
    )
    assert digest_tree(tmp_path / "tree") == digest_tree(Path(target)) == digest_tree(back)
    for name in NAMES:
        one = tmp_path / "tree" / os.fsdecode(name) / os.fsdecode(name)
        sent = await files.upload_file(one, f"{target}/files/")
        assert os.fsencode(sent).endswith(b"/" + name)
        got = await files.download_file(sent, f"{tmp_path}/one/")
        assert got.read_bytes() == name
        assert os.fsencode(got.name) == name
    "".join(told).encode()  # any terminal can show the progress
    missing = f"{target}/missing"
    with pytest.raises(FileTransferError) as caught:
        await files.download_file(missing, tmp_path / "none")
    assert "caf\\udce9/missing" in str(caught.value).encode().decode()
    with pytest.raises(ConfigError, match=r"guest_path='/\\ud800' is wrong"):
        await files.upload_file(tmp_path / "tree", "/\ud800")
    link.close()


async def test_a_big_file_and_a_big_tree_go_and_come_the_same(serve: Serve, tmp_path: Path) -> None:
    link = serve(10)
    files = Guest(link)
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1 << 20) * 200 + b"end")
    make_tree(tmp_path / "tree", 5000)
    await files.upload_file(big, f"{tmp_path}/there/")
    await files.download_file(f"{tmp_path}/there/big", tmp_path / "back")
    assert filecmp.cmp(big, tmp_path / "there" / "big", shallow=False)
    assert filecmp.cmp(big, tmp_path / "back", shallow=False)
    await files.upload_file(tmp_path / "tree", f"{tmp_path}/there/tree")
    await files.download_file(f"{tmp_path}/there/tree", tmp_path / "came")
    wanted = digest_tree(tmp_path / "tree")
    assert digest_tree(tmp_path / "there" / "tree") == wanted
    assert digest_tree(tmp_path / "came") == wanted
    link.close()


async def test_a_file_that_does_not_tell_its_size_comes_whole(serve: Serve, tmp_path: Path) -> None:
    link = serve(10)
    await Guest(link).download_file("/proc/self/limits", tmp_path / "limits")
    assert "Max open files" in (tmp_path / "limits").read_text()
    link.close()


@pytest.mark.parametrize("down", [False, True])
async def test_a_transfer_cancelled_anywhere_leaves_nothing(
    serve: Serve, tmp_path: Path, down: bool
) -> None:
    link = serve(10)
    files = Guest(link)
    source, target = tmp_path / "source", tmp_path / "target"
    make_tree(source / "tree", 40)
    (source / "big").write_bytes(os.urandom(3 << 20))
    target.mkdir()
    await files.upload_file(source / "big", f"{tmp_path}/connected")
    transfer = files.download_file if down else files.upload_file
    for steps in itertools.count(0, 11):
        copying = asyncio.ensure_future(transfer(str(source), f"{target}/copy"))
        for _ in range(steps):
            await asyncio.sleep(0)
        copying.cancel()
        with suppress(asyncio.CancelledError):
            await copying
        left = [path.name for path in target.iterdir()]
        assert left in ([], ["copy"]), left
        if left:
            assert digest_tree(target / "copy") == digest_tree(source)
            shutil.rmtree(target / "copy")
        if not copying.cancelled():
            break  # it was faster
    assert steps > 100
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
