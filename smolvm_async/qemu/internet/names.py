"""The names that a `restricted` guest has asked for, each with a synthetic address.

The guest never learns a real address. It connects to the synthetic one, and the real address is
chosen then. So many addresses behind one name, short times to live, and addresses that many names
share do no harm.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from ipaddress import IPv4Address, ip_network
from typing import NamedTuple

from smolvm_async.config.internet import LABEL
from smolvm_async.qemu.internet.policy import Address

SYNTHETIC = ip_network("198.18.0.0/15")  # for tests of networks: RFC 2544
FIRST, COUNT = int(SYNTHETIC.network_address) + 1, SYNTHETIC.num_addresses - 2
MOST = 1 << 14  # names; of more, the least recently asked one loses its address


class Goal(NamedTuple):
    """Where a connection of the guest goes: the name, its synthetic address, and the port."""

    name: str
    address: IPv4Address
    port: int


class Domains:
    """The names that are allowed: single names, and wildcards for all names below a name."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._names = frozenset(allowed)

    def __contains__(self, name: str) -> bool:
        """Return whether a name in lower case, without a last dot, is allowed."""
        labels = name.split(".")
        if not all(re.fullmatch(LABEL, label) for label in labels):
            return False  # a label of DNS may even contain a dot
        above = (".".join(["*", *labels[start:]]) for start in range(1, len(labels)))
        return name in self._names or any(wildcard in self._names for wildcard in above)


class Names:
    """Synthetic addresses by name, and names by synthetic address, for any thread."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._numbers: OrderedDict[str, int] = OrderedDict()  # the least recently asked is first
        self._names: dict[int, str] = {}
        self._real: dict[str, IPv4Address] = {}

    def add(self, name: str) -> None:
        """Give a name its synthetic address, which the guest may know from an earlier process."""
        with self._lock:
            self._number(name)

    def address_of(self, name: str, real: Iterable[Address]) -> IPv4Address:
        """Return the synthetic address of a name, and remember a real one for datagrams.

        The packets of one exchange need the same real address. So the name keeps the remembered
        one as long as `real` contains it.
        """
        found = [address for address in real if isinstance(address, IPv4Address)]
        with self._lock:
            number = self._number(name)
            if not found:
                self._real.pop(name, None)
            elif self._real.get(name) not in found:
                self._real[name] = found[0]
        return IPv4Address(FIRST + number)

    def name_of(self, address: Address) -> str | None:
        """Return the name that has a synthetic address; `None` if no name has the address."""
        if not isinstance(address, IPv4Address):
            return None
        return self._names.get(int(address) - FIRST)

    def real_address(self, name: str) -> IPv4Address | None:
        """Return the real IPv4 address for datagrams to a name; `None` if the name has none."""
        return self._real.get(name)

    def _number(self, name: str) -> int:
        """Return the number of a name, which is now the latest one.

        A name has nearly always the same number, also for a clone of the guest, and two names
        rarely have the same one, even at different times: programs may keep an address.
        """
        number = self._numbers.pop(name, None)
        if number is None:
            if len(self._numbers) >= self._most:
                oldest, free = self._numbers.popitem(last=False)
                self._real.pop(oldest, None)
                del self._names[free]
            number = zlib.crc32(name.encode()) % COUNT
            while number in self._names:
                number = (number + 1) % COUNT
        self._numbers[name], self._names[number] = number, name
        return number
