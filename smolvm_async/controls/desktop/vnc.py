"""VNC: the desktop for people."""

from __future__ import annotations

from smolvm_async.config.checks import VNCKind, check_vnc_kind
from smolvm_async.controls.desktop.control import Control
from smolvm_async.errors import ConfigError


class VNC(Control):
    """QEMU's VNC server, which works from the firmware on; off unless `vnc=` turned it on."""

    async def url(self) -> str:
        """Where it listens, with the password.

        Returns:
            `vnc://:PASSWORD@127.0.0.1:PORT`, or `vnc+unix://:PASSWORD@/PATH` with the path of a
            socket that only this user can connect to.

        Raises:
            ConfigError: It is off.
            VMNotRunningError: The VM does not run.
        """
        url = await self.running().peripherals.vnc.url()
        if url is None:
            raise ConfigError(
                f"the VNC server of {self.vm.config.vm_id} is off: call vm.vnc.start(), or pass "
                "vnc='loopback' or vnc='unix' to AsyncSmolVM."
            )
        return url

    async def start(self, kind: VNCKind = "loopback") -> str:
        """Listen, with a new random password; what it listened on before is closed.

        Args:
            kind: `"loopback"`, a port of 127.0.0.1 that the kernel chooses; or `"unix"`, a socket
                in the VM's directory.

        Returns:
            See `url()`.

        Raises:
            ConfigError: `kind` is none of these.
            MonitorError: QEMU refuses it.
            VMNotRunningError: The VM does not run.
        """
        checked = check_vnc_kind(kind, "kind")
        if checked is None:
            raise ConfigError(f"kind={kind!r} is wrong: pass 'loopback' or 'unix'; see stop().")
        return await self.running().peripherals.vnc.start(checked)

    async def stop(self) -> None:
        """Close it; clients that are connected stay so until they leave.

        Raises:
            VMNotRunningError: The VM does not run.
        """
        await self.running().peripherals.vnc.stop()
