"""Port forwards from 127.0.0.1 to the guest, through QEMU's user network (slirp).

QMP has no commands for port forwards. `hostfwd_add`, `hostfwd_remove` and `info usernet` are
commands of the human monitor, which answers in text.
"""

from __future__ import annotations

import errno
import re
import socket
from functools import partial

from smolvm_async.config.checks import PortForward
from smolvm_async.errors import ConfigError, MonitorError
from smolvm_async.foundation.rpc import rpc
from smolvm_async.qemu.arguments import NETWORK
from smolvm_async.qemu.monitor import CommandQueue, Monitor

SSH = 22

# "  TCP[HOST_FORWARD]  13       127.0.0.1 39245       10.0.2.15    22     0     0"
_FORWARD = r"(?m)^\s*TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)\s"


class Ports:
    """The port forwards of a running guest, controlled over the monitor."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._commands = CommandQueue(monitor)
        self._ssh: int | None = None

    async def ssh(self) -> int:
        """Return the host port that QEMU forwards to the guest's SSH server."""
        if self._ssh is None:
            forwards = await self._read()
            found = [forward.host_port for forward in forwards if forward.guest_port == SSH]
            if not found or found[0] is None:
                raise MonitorError("QEMU does not forward a port to the guest's SSH server")
            self._ssh = found[0]
        return self._ssh

    @rpc
    async def forwards(self) -> list[PortForward]:
        """Return the port forwards, without the library's own forward to the SSH server."""
        ours = await self.ssh() if self._ssh is not None else None
        return [forward for forward in await self._read() if forward.host_port != ours]

    @rpc
    async def expose(self, guest_port: int, host_port: int | None) -> int:
        """Forward a port of 127.0.0.1 to `guest_port`, and return the host port."""
        return await self._commands.take(partial(self._expose, guest_port, host_port))

    async def _expose(self, guest_port: int, host_port: int | None) -> int:
        before = await self._read()
        rule = f"tcp:127.0.0.1:{host_port or 0}-:{guest_port}"
        said = await self._ask(f"hostfwd_add {NETWORK} {rule}")
        new = [forward for forward in await self._read() if forward not in before]
        if said or not new or new[0].host_port is None:
            port = f"host_port={host_port}" if host_port else "a port of the host's choosing"
            reason, hint = _why_not(host_port, said.strip())
            message = f"{port} cannot be forwarded to the guest's port {guest_port}: {reason}."
            raise ConfigError(message, hint=hint)
        return new[0].host_port

    @rpc
    async def unexpose(self, host_port: int) -> None:
        """Remove a port forward. Its open connections stay open."""
        await self._commands.take(partial(self._unexpose, host_port))

    async def _unexpose(self, host_port: int) -> None:
        known = [forward.host_port for forward in await self.forwards()]
        if host_port not in known:
            ports = ", ".join(map(str, known)) or "none"
            raise ConfigError(
                f"host_port={host_port} is not forwarded; the forwarded ports are: {ports}."
            )
        await self._ask(f"hostfwd_remove {NETWORK} tcp:127.0.0.1:{host_port}")

    async def _read(self) -> list[PortForward]:
        found = re.findall(_FORWARD, await self._ask("info usernet"))
        return [PortForward(int(guest), int(host)) for host, guest in found]

    async def _ask(self, line: str) -> str:
        answer = await self._monitor.complete("human-monitor-command", {"command-line": line})
        return str(answer)


def _why_not(host_port: int | None, said: str) -> tuple[str, str]:
    """Try to listen on a port, and return the reason why QEMU cannot, and the fix.

    QEMU's own message `said` never has the reason.
    """
    from smolvm_async.host.restrictions import find_cause  # rarely needed

    another = "Choose another port, or leave host_port= out: the kernel then finds a free port."
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", host_port or 0))
            listener.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "another program on this host uses the port", another
        if error.errno == errno.EACCES:
            return (
                "this user may not use the port (see net.ipv4.ip_unprivileged_port_start)",
                another,
            )
        said = f"{said} ({error.strerror})"
    cause = find_cause(f"host forwarding rule: {said}")
    return cause or (f"QEMU says {said!r}", "")
