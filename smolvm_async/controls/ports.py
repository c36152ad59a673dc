"""TCP ports of the guest on the host's loopback."""

from __future__ import annotations

from collections.abc import Sequence

from smolvm_async.config.checks import PortForward, check_port
from smolvm_async.controls.interface import VM, running


class PortForwarding:
    """`AsyncSmolVM`'s port forwards: 127.0.0.1 only, by QEMU's user network, for any guest OS."""

    _vm: VM

    async def expose_local(self, guest_port: int, host_port: int | None = None) -> int:
        """Forward a port of 127.0.0.1 to a TCP port of the guest, until the VM ends.

        QEMU accepts connections from now on, also while nothing listens in the guest: those are
        closed again.

        Args:
            guest_port: What listens in the guest, on any address of its network card.
            host_port: By default one that the kernel finds free.

        Returns:
            The host's port.

        Raises:
            ConfigError: A port is wrong, or the host's is taken (a `ValueError`).
            VMNotRunningError: The VM does not run.
        """
        check_port("guest_port", guest_port)
        if host_port is not None:
            check_port("host_port", host_port)
        return await running(self._vm).peripherals.ports.expose(guest_port, host_port)

    async def unexpose_local(self, host_port: int) -> None:
        """Forward it no longer; connections that are open stay open.

        Raises:
            ConfigError: It is not forwarded (a `ValueError`).
            VMNotRunningError: The VM does not run.
        """
        check_port("host_port", host_port)
        await running(self._vm).peripherals.ports.unexpose(host_port)

    async def list_port_forwards(self) -> Sequence[PortForward]:
        """What is forwarded now.

        Raises:
            VMNotRunningError: The VM does not run.
        """
        return await running(self._vm).peripherals.ports.forwards()
