"""The policy of `InternetSettings`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address, ip_address, ip_network
from typing import NamedTuple

from smolvm_async.config.internet import InternetSettings
from smolvm_async.qemu.internet.addresses import PRIVATE, SHUT, Host, embedded, shut_network
from smolvm_async.qemu.internet.names import Domains, Goal, Names
from smolvm_async.qemu.internet.policy import LOOPBACK, Address, Transport, Verdict

DNS = 53

# QEMU's network has turned the guest's addresses for its host and for its DNS server into others.
HOST: dict[Address, Address] = {
    LOOPBACK: ip_address("10.0.2.2"),
    ip_address("::1"): ip_address("fec0::2"),
}
SERVER = {4: ip_address("10.0.2.3"), 6: ip_address("fec0::3")}


class Services(NamedTuple):
    """Parts of a gateway, which leads a guest to names.

    Attributes:
        dns: The port of the resolver on 127.0.0.1, for UDP and TCP.
        relay: The port of the relay on 127.0.0.1.
        expect: Announces a connection to the relay, with its local port.
        names: The names that the guest has asked for.
    """

    dns: int
    relay: int
    expect: Callable[[Goal, int], None]
    names: Names


class Rules:
    """The policy of `InternetSettings`. All methods may be called in any thread.

    Args:
        services: Needed in the mode `restricted`. In the mode `open`, the addresses go on working
            that the guest was given in the mode `restricted`.
    """

    def __init__(
        self, settings: InternetSettings, host: Host, services: Services | None = None
    ) -> None:
        self._mode = settings.mode
        self._domains = Domains(settings.allowed_domains)
        self._networks = [ip_network(network) for network in settings.allowed_cidrs]
        self._ports = frozenset(settings.allowed_host_ports)
        self._host = host
        self._services = services

    def decide(self, protocol: Transport, address: Address, port: int) -> Verdict:
        """See `Policy`."""
        if self._services is not None and self._mode != "off":
            if self._mode == "restricted" and port == DNS and protocol != "icmp":
                return Verdict(LOOPBACK, self._services.dns)
            name = self._services.names.name_of(address)
            if name is not None and isinstance(address, IPv4Address):
                return self._named(self._services, protocol, Goal(name, address, port))
        reason = self._reason(protocol, address, port)
        if not reason:
            return Verdict(address, port)
        return Verdict(None, 0, reason, asked=self._as_the_guest_says(address, port))

    def allows(self, name: str) -> bool:
        """Return whether the guest may reach a name, if it has an address that is allowed."""
        return self._mode == "open" or (self._mode == "restricted" and name in self._domains)

    def reason_against(self, address: Address) -> str:
        """Return why a name may not have an address; empty if it may."""
        for each in dict.fromkeys((address, embedded(address))):
            if not self._has(each):
                if reason := self._reason_shut(each):
                    return reason
                private = any(each in network for network in PRIVATE)
                if private and self._mode == "restricted":
                    return "a private address, which allowed_cidrs does not have"
        return ""

    def still_allows(self, goal: Goal, address: Address | None) -> bool:
        """Return whether a relayed connection may go on."""
        return self.allows(goal.name) and (address is None or not self.reason_against(address))

    def _named(self, services: Services, protocol: Transport, goal: Goal) -> Verdict:
        name, _, port = goal
        if not self.allows(name):
            return Verdict(None, 0, "a name that is not allowed any more", name)
        if protocol == "tcp":
            announce = partial(services.expect, goal)
            return Verdict(LOOPBACK, services.relay, name=name, announce=announce)
        real = services.names.real_address(name)
        reason = self.reason_against(real) if real else "a name without an IPv4 address"
        return Verdict(None, 0, reason, name) if reason else Verdict(real, port, name=name)

    def _reason(self, protocol: Transport, address: Address, port: int) -> str:
        if self._mode == "off":
            return "the guest has no network"
        if address in HOST and port in self._ports and protocol != "icmp":
            return ""
        if self._has(address):
            return ""
        if self._mode == "restricted":
            return "not allowed"
        if port == DNS and protocol != "icmp" and self._host.asks(address):
            return ""
        return self._reason_shut(address)

    def _has(self, address: Address) -> bool:
        """Return whether `allowed_cidrs` has the address."""
        lengths = [each.prefixlen for each in self._networks if address in each]
        if not lengths:
            return False
        # A larger network, such as 0.0.0.0/0, does not mean the host.
        shut = shut_network(address)
        own = address.max_prefixlen if self._host.has(address) else 0
        return max(lengths) >= (own if shut is None else shut.prefixlen)

    def _reason_shut(self, address: Address) -> str:
        for each in dict.fromkeys((address, embedded(address))):
            if (shut := shut_network(each)) is not None:
                return SHUT[shut]
            if self._host.has(each):
                return "an address of this host"
        return ""

    def _as_the_guest_says(self, address: Address, port: int) -> Address | None:
        if port == DNS and self._host.asks(address):
            return SERVER[address.version]
        return HOST.get(address)
