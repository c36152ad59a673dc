"""TCP ports of the guest, forwarded from the host's loopback."""

from __future__ import annotations

from collections.abc import Sequence

from smolvm_async.config.checks import PortForward, check_port
from smolvm_async.controls.interface import VM, in_use


class PortForwarding:
    """`AsyncSmolVM`'s port forwards: on 127.0.0.1 only, by QEMU's user network, for any guest."""

    _vm: VM

    async def expose_local(self, guest_port: int, host_port: int | None = None) -> int:
        """Forward a port of 127.0.0.1 to a TCP port of the guest, until the VM ends.

        QEMU accepts connections from now on. While no program listens in the guest, QEMU closes
        each connection again.

        Args:
            guest_port: The port that a program listens on in the guest, on any address of its
                network card.
            host_port: A port of 127.0.0.1; by default the kernel chooses a free port.

        Returns:
            The host's port.

        Raises:
            ConfigError: A port is wrong, or the host's port is in use (a `ValueError`).
            VMNotRunningError: The VM is not running.
        """
        check_port("guest_port", guest_port)
        if host_port is not None:
            check_port("host_port", host_port)
        return await (await in_use(self._vm)).peripherals.ports.expose(guest_port, host_port)

    async def unexpose_local(self, host_port: int) -> None:
        """Stop forwarding a port of the host. Open connections stay open.

        Raises:
            ConfigError: The port is not forwarded (a `ValueError`).
            VMNotRunningError: The VM is not running.
        """
        check_port("host_port", host_port)
        await (await in_use(self._vm)).peripherals.ports.unexpose(host_port)

    async def list_port_forwards(self) -> Sequence[PortForward]:
        """Return the ports that are forwarded now.

        Raises:
            VMNotRunningError: The VM is not running.
        """
        return await (await in_use(self._vm)).peripherals.ports.forwards()
