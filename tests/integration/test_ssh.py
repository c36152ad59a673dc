"""Commands against a real OpenSSH server of this host, for what the guest's does not do."""

from __future__ import annotations

import asyncio
import getpass
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from smolvm_async import ConnectionLostError
from smolvm_async.ssh.access import Access
from smolvm_async.ssh.commands import Commands
from smolvm_async.ssh.keys import make_key_pair
from smolvm_async.ssh.link import Link

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
"""

Serve = Callable[[int], Link]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers with a bound on sessions; each gets a link to it."""
    servers = []

    def start(sessions: int) -> Link:
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

        async def access() -> Access:
            return Access(port, getpass.getuser(), key.private.decode(), host_key.public)

        return Link("host", access)

    yield start
    for server in servers:
        server.terminate()
        server.wait()


def commands(link: Link) -> Commands:
    async def reach() -> Link:
        return link

    return Commands(reach)


@pytest.mark.parametrize("sessions", [1, 10])
async def test_a_servers_bound_on_sessions_is_learnt(serve: Serve, sessions: int) -> None:
    link = serve(sessions)
    guest = commands(link)
    results = await asyncio.gather(*(guest.run(f"echo {n}", timeout=60) for n in range(60)))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(60)]
    link.close()


async def test_a_server_that_allows_none_is_told(serve: Serve) -> None:
    link = serve(0)
    with pytest.raises(ConnectionLostError, match="refuses sessions"):
        await commands(link).run("true")
    link.close()


async def test_a_cancelled_command_gives_its_session_back(serve: Serve) -> None:
    link = serve(1)
    guest = commands(link)
    for _ in range(20):
        running = asyncio.ensure_future(guest.run("sleep 50"))
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert (await guest.run("echo free")).stdout == "free\n"
    link.close()
