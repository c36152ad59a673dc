"""Addresses that an open network does not include, and those that names may not have.

An open network does not include the addresses of this host, of its link, of the metadata services
of clouds, and all that reach many hosts. A name of the internet has no private address.
"""

from __future__ import annotations

import time
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path

from smolvm_async.qemu.internet import sockets
from smolvm_async.qemu.internet.policy import Address

REFRESH = 1.0  # seconds: the host may get other addresses, and other name servers

SHUT: dict[IPv4Network | IPv6Network, str] = {
    ip_network(network): reason
    for network, reason in {
        "127.0.0.0/8": "this host's loopback",
        "::1/128": "this host's loopback",
        "0.0.0.0/8": "this host's loopback",
        "::/128": "this host's loopback",
        "169.254.0.0/16": "a link-local or metadata address",
        "fe80::/10": "a link-local address",
        "fec0::/10": "QEMU's own network",
        "fd00:ec2::254/128": "a metadata address",
        "fd20:ce::254/128": "a metadata address",
        "100.100.100.200/32": "a metadata address",
        "192.0.0.192/32": "a metadata address",
        "168.63.129.16/32": "a metadata address",
        "224.0.0.0/4": "a multicast address",
        "ff00::/8": "a multicast address",
        "255.255.255.255/32": "a broadcast address",
    }.items()
}

PRIVATE = [
    ip_network(network)
    for network in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "240.0.0.0/4",
        "fc00::/7",
    )
]
NAT64 = ip_network("64:ff9b::/96")  # RFC 6052


def shut_network(address: Address) -> IPv4Network | IPv6Network | None:
    """Return the network of `SHUT` that has the address."""
    return next((network for network in SHUT if address in network), None)


def embedded(address: Address) -> Address:
    """Return the IPv4 address that a gateway reaches for an IPv6 address, or else the address."""
    if not isinstance(address, IPv6Address):
        return address
    if address in NAT64:
        return ip_address(address.packed[12:])
    return address.sixtofour or address


class Host:
    """This host's own addresses and name servers, looked at anew every second, in any thread."""

    def __init__(self) -> None:
        self._looked = 0.0
        self._own: dict[Address, bool] = {}
        self._servers: frozenset[Address] = frozenset()

    def has(self, address: Address) -> bool:
        """Return whether an address is one of this host's, or a broadcast address of its links."""
        self._refresh()
        own = self._own  # another thread may refresh it
        if address not in own:
            own[address] = sockets.is_local(address)
        return own[address]

    def asks(self, address: Address) -> bool:
        """Return whether this host asks a DNS server with this address."""
        self._refresh()
        return address in self._servers

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked >= REFRESH or len(self._own) > 4096:
            self._looked, self._own, self._servers = now, {}, _name_servers()


def _name_servers() -> frozenset[Address]:
    servers = []
    try:
        for line in Path("/etc/resolv.conf").read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                servers.append(ip_address(words[1].partition("%")[0]))
    except (OSError, ValueError):
        pass
    return frozenset(servers)
