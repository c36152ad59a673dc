"""The VNC server: the guest's desktop for a human with a VNC viewer."""

from __future__ import annotations

from smolvm_async.config.checks import VNCKind, check_vnc_kind
from smolvm_async.controls.interface import Control
from smolvm_async.errors import ConfigError


class VNC(Control):
    """QEMU's VNC server, which shows the guest from the firmware on; off by default, see `vnc=`."""

    async def url(self) -> str:
        """Return the URL of the VNC server, with the password.

        Returns:
            `vnc://:PASSWORD@127.0.0.1:PORT`, or `vnc+unix://:PASSWORD@/PATH` with the path of a
            socket that only this user can connect to.

        Raises:
            ConfigError: The VNC server is off (a `ValueError`).
            VMNotRunningError: The VM is not running.
        """
        url = await (await self.in_use()).peripherals.vnc.url()
        if url is None:
            raise ConfigError(
                f"the VNC server of {self.vm.config.vm_id} is off: call vm.vnc.start(), or pass "
                "vnc='loopback' or vnc='unix' to AsyncSmolVM."
            )
        return url

    async def start(self, kind: VNCKind = "loopback") -> str:
        """Listen with a new random password, and close the previous port or socket.

        Args:
            kind: `"loopback"` for a port of 127.0.0.1 that the kernel chooses; `"unix"` for a
                socket in the VM's directory.

        Returns:
            See `url()`.

        Raises:
            ConfigError: `kind` is neither of these (a `ValueError`).
            MonitorError: QEMU refuses to listen.
            VMNotRunningError: The VM is not running.
        """
        checked = check_vnc_kind(kind, "kind")
        if checked is None:
            raise ConfigError(
                f"kind={kind!r} is wrong: pass 'loopback' or 'unix'. To turn the VNC server off, "
                "call stop()."
            )
        return await (await self.in_use()).peripherals.vnc.start(checked)

    async def stop(self) -> None:
        """Stop listening. Connected clients stay connected until they disconnect.

        Raises:
            VMNotRunningError: The VM is not running.
        """
        await (await self.in_use()).peripherals.vnc.stop()
