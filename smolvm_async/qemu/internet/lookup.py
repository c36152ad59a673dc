"""Looks names up as the host itself does, with its hosts file and its DNS servers.

A lookup cannot be cancelled, and may take a minute. So each has a daemon thread of its own, which
nobody waits for at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from smolvm_async.foundation.tasks import no_thread
from smolvm_async.qemu.internet.policy import Address

AT_ONCE = 16  # threads
HOSTS = Path("/etc/hosts")
PATIENCE = 10.0  # seconds for a lookup, with the wait for a thread


class Lookup:
    """Looks names up in an event loop, a bounded number at a time."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def addresses(self, name: str) -> Sequence[Address]:
        """Return the addresses of a name, the best first; none if there is no such name.

        Raises:
            OSError: The name could not be looked up.
        """
        async with asyncio.timeout(PATIENCE):
            await self._turns.acquire()
            found = self._begin(name)
            return await asyncio.shield(found)

    def _begin(self, name: str) -> asyncio.Future[Sequence[Address]]:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Sequence[Address]] = loop.create_future()

        def look() -> None:
            error: Exception | None = None
            addresses: Sequence[Address] = ()
            try:
                addresses = _look_up(name)
            except (OSError, ValueError) as failure:
                error = OSError(f"{name}: {failure}")
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(done, addresses, error)

        def done(addresses: Sequence[Address], error: Exception | None) -> None:
            self._turns.release()
            if error is None:
                found.set_result(addresses)
            else:
                found.set_exception(error)
                found.exception()  # is seen, also if nobody waits any more

        try:
            threading.Thread(target=look, name="smolvm-lookup", daemon=True).start()
        except RuntimeError as error:
            self._turns.release()
            raise OSError(str(no_thread(error))) from error
        return found


def _look_up(name: str) -> Sequence[Address]:
    try:
        found = socket.getaddrinfo(_exact(name), None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return ()
        raise
    texts = (str(address[0]).partition("%")[0] for *_, address in found)
    return tuple(dict.fromkeys(_unmapped(ip_address(text)) for text in texts))


def _exact(name: str) -> bytes:
    """Return a name with a last dot: the host's search list does not make other names of it.

    The host does not find a name with a last dot in its hosts file, and a name of one label needs
    the search list.
    """
    try:
        hosts = HOSTS.read_text(errors="replace").lower()
    except OSError:
        hosts = ""
    as_it_is = "." not in name or (
        name in hosts
        and any(name in line.partition("#")[0].split()[1:] for line in hosts.splitlines())
    )
    return f"{name}{'' if as_it_is else '.'}".encode("ascii")


def _unmapped(address: Address) -> Address:
    """Return the IPv4 address that a connection to an address like ::ffff:127.0.0.1 reaches."""
    return getattr(address, "ipv4_mapped", None) or address
