"""OpenSSH servers of this host, which take the place of a guest's server."""

from __future__ import annotations

import getpass
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.login import Access, make_key_pair
from smolvm_async.qemu.pauses import Pauses

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
Subsystem sftp internal-sftp {sftp}
{more}
"""

Start = Callable[[int], Access]


@contextmanager
def ssh_servers(directory: Path, sftp: str = "", more: str = "") -> Iterator[Start]:
    """Yield a function that starts a server with a bound on sessions.

    Args:
        directory: The directory for the server's files.
        sftp: Options of the SFTP server.
        more: More lines for the configuration.
    """
    servers = []

    def start(sessions: int) -> Access:
        key, host_key = make_key_pair(), make_key_pair()
        Path("/run/sshd").mkdir(exist_ok=True)
        (directory / "host").write_bytes(host_key.private)
        (directory / "host").chmod(0o600)
        (directory / "authorized").write_text(key.public)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        values = {"directory": directory, "sessions": sessions, "sftp": sftp, "more": more}
        config = CONFIG.format(port=port, **values)
        (directory / "config").write_text(config)
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", directory / "config"])
        servers.append(server)
        return Access(port, getpass.getuser(), key.private.decode(), host_key.public)

    try:
        yield start
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def link_with(access: Access, *, final: bool = False) -> Link:
    """Return a link to a server."""

    async def known() -> Access:
        return access

    return Link("host", known, Pauses(), final=final)
