"""The network of one VM: its guard, with the policy that its settings ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_network
from types import TracebackType
from typing import Self

from smolvm_async.config.internet import InternetSettings
from smolvm_async.foundation.process import Spawner
from smolvm_async.foundation.tasks import in_thread, settle
from smolvm_async.qemu.internet.addresses import SHUT, Host, shut_network
from smolvm_async.qemu.internet.guard import Denied, Guard
from smolvm_async.qemu.internet.policy import Address, Transport, Verdict

DNS = 53
LOOPBACK = ("127.0.0.1", "::1")  # QEMU's network turns 10.0.2.2 and fec0::2 into these


class SettingsPolicy:
    """The policy of `InternetSettings`."""

    def __init__(self, settings: InternetSettings, host: Host) -> None:
        self._mode = settings.mode
        self._networks = [ip_network(network) for network in settings.allowed_cidrs]
        self._ports = frozenset(settings.allowed_host_ports)
        self._host = host

    def decide(self, protocol: Transport, address: Address, port: int) -> Verdict:
        """See `Policy`."""
        reason = self._reason(protocol, address, port)
        return Verdict(None, 0, reason) if reason else Verdict(address, port)

    def _reason(self, protocol: Transport, address: Address, port: int) -> str:
        if self._mode == "off":
            return "the guest has no network"
        if str(address) in LOOPBACK and port in self._ports and protocol != "icmp":
            return ""
        shut = shut_network(address)
        allowed = [network for network in self._networks if address in network]
        if shut is not None:  # a larger network, such as 0.0.0.0/0, does not mean the host
            allowed = [network for network in allowed if network.prefixlen >= shut.prefixlen]
        if allowed:
            return ""
        if self._mode == "restricted":
            return "not allowed"
        if port == DNS and protocol != "icmp" and self._host.asks(address):
            return ""
        if shut is not None:
            return SHUT[shut]
        return "an address of this host" if self._host.has(address) else ""


class Internet:
    """The network of one VM, until the end of the block.

    Attributes:
        spawner: Spawns the VM's processes.

    Args:
        on_denied: See `Guard`.
    """

    def __init__(
        self, settings: InternetSettings, vm_id: str, on_denied: Callable[[Denied], None]
    ) -> None:
        self._host = Host()
        self._guard = Guard(SettingsPolicy(settings, self._host), on_denied)
        self.spawner: Spawner = self._guard.spawner
        self._vm_id = vm_id

    async def __aenter__(self) -> Self:
        await self._guard.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await settle(asyncio.ensure_future(self._guard.close()))

    async def change(self, settings: InternetSettings) -> None:
        """Change the policy, and end the connections that it refuses."""
        await in_thread(self._guard.set_policy, SettingsPolicy(settings, self._host))
