"""QEMU's VNC server, which listens only between `start()` and `stop()`."""

from __future__ import annotations

import os
import secrets
import string
from functools import partial
from pathlib import Path
from urllib.parse import quote

from smolvm_async.config.checks import VNCKind
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.rpc import rpc
from smolvm_async.qemu.monitor import CommandQueue, Monitor
from smolvm_async.state.names import VNC

MAX_PATH = 107  # bytes in the path of a socket; unix(7)
PASSWORD = 8  # characters; VNC's authentication (RFC 6143) ignores further characters


class VNCServer:
    """The VNC server of QEMU, turned on and off over the monitor."""

    def __init__(self, monitor: Monitor, directory: Path) -> None:
        self._monitor = monitor
        self._directory = directory
        self._commands = CommandQueue(monitor)
        self._url: str | None = None

    @rpc
    async def start(self, kind: VNCKind) -> str:
        """Replace an earlier listener: listen with a new random password, and return the URL.

        Raises:
            ConfigError: If the path of the socket would be too long.
            MonitorError: If QEMU refuses, for example because it was built without VNC.
            VMNotRunningError: If QEMU has ended.
        """
        return await self._commands.take(partial(self._start, kind))

    async def _start(self, kind: VNCKind) -> str:
        alphabet = string.ascii_letters + string.digits
        password = "".join(secrets.choice(alphabet) for _ in range(PASSWORD))
        path = self._directory / VNC
        if kind == "unix" and len(os.fsencode(path)) > MAX_PATH:
            raise ConfigError(
                f"{str(path)!r} is longer than the {MAX_PATH} bytes that the path of a socket may "
                "have: use vnc='loopback', or a shorter data_dir=."
            )
        await self._stop()
        await self._monitor.complete("set_password", {"protocol": "vnc", "password": password})
        if kind == "unix":
            # The path is relative to QEMU's working directory.
            await self._listen({"type": "unix", "path": VNC})
            self._url = f"vnc+unix://:{password}@{quote(os.fsencode(path))}"
        else:
            await self._listen({"type": "inet", "host": "127.0.0.1", "port": "0", "ipv6": False})
            servers = await self._monitor.complete("query-vnc-servers")
            port = servers[0]["server"][0]["service"]
            self._url = f"vnc://:{password}@127.0.0.1:{port}"
        return self._url

    @rpc
    async def stop(self) -> None:
        """Stop listening. Do nothing if the server does not listen."""
        await self._commands.take(self._stop)

    async def _stop(self) -> None:
        if self._url is not None:
            await self._listen()
            self._url = None

    async def _listen(self, *addresses: dict[str, object]) -> None:
        await self._monitor.complete("display-update", {"type": "vnc", "addresses": [*addresses]})

    @rpc
    async def url(self) -> str | None:
        """Return the URL with the password; `None` while the server does not listen."""
        return self._url
