"""Where a packet of the guest may go."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, NamedTuple, Protocol

Transport = Literal["tcp", "udp", "icmp"]
Address = IPv4Address | IPv6Address

LOOPBACK = IPv4Address("127.0.0.1")


class Verdict(NamedTuple):
    """A decision about a packet or a connection.

    Attributes:
        address: Where it really goes; `None` if it is refused. An IPv4 address is fine for a
            packet of IPv6, too.
        port: The port where it really goes.
        reason: Why it is refused, such as `the host's loopback`.
        name: The domain name that the guest had asked for, if any.
        announce: Called with the local port of a TCP connection on 127.0.0.1 before the
            connection is made, so that the server knows the connection.
        asked: The address that the guest used, if QEMU's network has changed the address.
    """

    address: Address | None
    port: int
    reason: str = ""
    name: str = ""
    announce: Callable[[int], None] | None = None
    asked: Address | None = None


class Policy(Protocol):
    """Decides at once, in any thread."""

    def decide(self, protocol: Transport, address: Address, port: int) -> Verdict:
        """Decide about a packet to `address`, which is never an IPv4 address in IPv6's form."""
