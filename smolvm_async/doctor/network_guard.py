"""Test the guard of a guest's network with a small program in the place of QEMU."""

from __future__ import annotations

import asyncio
import socket
import sys
from ipaddress import ip_address
from pathlib import Path

from smolvm_async.doctor.findings import Verdict, ok, warning
from smolvm_async.doctor.probe import scratch
from smolvm_async.errors import HostError
from smolvm_async.foundation.process import spawn
from smolvm_async.host.seccomp import check_seccomp
from smolvm_async.qemu.internet.denials import Denied
from smolvm_async.qemu.internet.guard import Guard
from smolvm_async.qemu.internet.policy import Address, Transport
from smolvm_async.qemu.internet.policy import Verdict as Decision

# Addresses for documentation, which no host has; RFC 5737.
ALLOWED, REFUSED = ip_address("198.51.100.1"), ip_address("198.51.100.2")

CONNECT = f"""
import select, socket
for address in "{ALLOWED}", "{REFUSED}":
    connection = socket.socket()
    connection.setblocking(False)
    connection.connect_ex((address, 9))
    select.select([], [connection], [], 10)
    try:
        connection.getpeername()
        print("connected")
    except OSError:
        print("refused")
"""
EXPECTED = "connected\nrefused"

WITHOUT = (
    "Guests start nevertheless, but they reach the services on this host's loopback (10.0.2.2), "
    "and restricted guests do not start"
)


class _Policy:
    def __init__(self, port: int) -> None:
        self._port = port

    def decide(self, protocol: Transport, address: Address, port: int) -> Decision:
        if address == ALLOWED:
            return Decision(ip_address("127.0.0.1"), self._port)
        return Decision(None, 0, "not the address of the check")


async def check_network_guard(data_dir: Path) -> Verdict:
    """Let a guard redirect one connection of a program, and refuse another one."""
    denied: list[Denied] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        guard = Guard(_Policy(server.getsockname()[1]), denied.append)
        try:
            check_seccomp()
            await guard.start()
            said = await _try(guard, data_dir)
        except HostError as error:
            return warning(f"{error.message} {WITHOUT}.", error.hint)
        finally:
            await guard.close()
    if said != EXPECTED or len(denied) != 1:
        seen = said.replace("\n", " ")
        found = f"the guard of the network does not work: a program saw {seen!r}"
        return warning(f"{found}. {WITHOUT}.", "Report this, with the version of Linux.")
    return ok("connections of a guest can be redirected and refused (seccomp, pidfd_getfd)")


async def _try(guard: Guard, data_dir: Path) -> str:
    async with scratch(data_dir) as state:
        argv, log = [sys.executable, "-I", "-S", "-c", CONNECT], state.path / "guard.log"
        child = await spawn("guard", argv, cwd=state.path, log=log, fds=[], spawner=guard.spawner)
        try:
            await asyncio.wait([child.exited])
        finally:
            await child.reap()
        return child.log.text().strip()
