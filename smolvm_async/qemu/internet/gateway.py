"""The resolver and the relay of one VM, in a thread of their own with an event loop of its own.

So a blocked event loop of the user does not stop the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address

from smolvm_async.errors import HostError
from smolvm_async.foundation.fork import private, uses_loop
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import no_thread
from smolvm_async.qemu.internet.denials import Denied
from smolvm_async.qemu.internet.lookup import Lookup
from smolvm_async.qemu.internet.names import Goal, Names
from smolvm_async.qemu.internet.policy import LOOPBACK, Address
from smolvm_async.qemu.internet.relay import Relay
from smolvm_async.qemu.internet.rules import Rules, Services

logger = get_logger(__name__)

BACKLOG = 1024  # connections that wait for the relay
PATIENCE = 10.0  # seconds for the thread to end, or to end connections; it never waits that long
ATTEMPTS = 10  # to find a port that is free for both UDP and TCP


class Gateway:
    """Leads a `restricted` guest to the names that its policy allows.

    Attributes:
        services: For the policy.

    Args:
        report: Called with each refusal, in the gateway's thread.

    Raises:
        HostError: The host lacks threads, descriptors or ports now.
    """

    def __init__(self, report: Callable[[Denied], None]) -> None:
        self._report = report
        self._rules: Rules | None = None
        self._lookup = Lookup()
        self._relay = Relay(self._find, self._still_allows, self._refuse)
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="smolvm-gateway", daemon=True)
        self._opened = contextlib.ExitStack()  # the thread closes them
        try:
            self._open()
            self._thread.start()
        except RuntimeError as error:
            self._opened.close()
            raise no_thread(error) from error
        except OSError as error:
            self._opened.close()
            raise HostError(
                f"A guest's network cannot be restricted to names now: {error.strerror}.",
                hint="Close files, or raise the limit: ulimit -n.",
            ) from error

    def _open(self) -> None:
        self._datagrams, self._queries = _sockets_on_one_port(self._opened)
        self._listener = self._opened.enter_context(
            socket.create_server((str(LOOPBACK), 0), backlog=BACKLOG)
        )
        for sock in self._datagrams, self._queries, self._listener:
            private(sock.fileno())
            sock.setblocking(False)
        loop = asyncio.SelectorEventLoop()
        self._loop = self._opened.enter_context(contextlib.closing(loop))
        uses_loop(self._loop)
        dns, relay = self._datagrams.getsockname()[1], self._listener.getsockname()[1]
        self.services = Services(dns, relay, self._relay.expect, Names())

    def set_rules(self, rules: Rules) -> None:
        """Change the policy, and end the connections that it refuses. Call this in a thread."""
        self._rules = rules
        ending = self._relay.end_refused()
        try:
            asyncio.run_coroutine_threadsafe(ending, self._loop).result(PATIENCE)
        except RuntimeError:  # the thread has failed, and all connections have ended
            ending.close()

    def close(self) -> None:
        """End the thread and all connections. Call this in a thread."""
        with contextlib.suppress(RuntimeError):  # the thread has failed
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(PATIENCE)

    # The rest runs in the gateway's thread.

    def _run(self) -> None:
        try:
            with self._opened, asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except Exception:
            logger.exception("the gateway has failed: the guest reaches no names any more")

    async def _serve(self) -> None:
        from smolvm_async.qemu.internet.resolver import Resolver  # needs dnspython, only here

        resolver = Resolver(self._allows, self._resolve)
        await asyncio.start_server(resolver.serve_connection, sock=self._queries)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(resolver.serve_datagrams(self._datagrams)),
                group.create_task(self._relay.serve(self._listener)),
            ]
            await self._over.wait()
            for task in tasks:
                task.cancel()

    def _allows(self, name: str) -> bool:
        if self._rules is not None and self._rules.allows(name):
            return True
        self._report(Denied("dns", None, 0, name, "a name that is not allowed"))
        return False

    async def _resolve(self, name: str) -> IPv4Address | None:
        found = await self._lookup.addresses(name)
        allowed, reason = self._split(found)
        if allowed:
            return self.services.names.address_of(name, allowed)
        if found:
            self._report(Denied("dns", None, 0, name, reason))
        return None

    async def _find(self, goal: Goal) -> Sequence[Address]:
        found = await self._lookup.addresses(goal.name)
        allowed, reason = self._split(found)
        if found and not allowed:
            self._refuse(goal, reason)
        return allowed

    def _still_allows(self, goal: Goal, address: Address | None) -> bool:
        return self._rules is not None and self._rules.still_allows(goal, address)

    def _split(self, found: Sequence[Address]) -> tuple[Sequence[Address], str]:
        """Return the addresses that a name may have, and the reason against the others."""
        assert self._rules is not None
        reasons = {address: self._rules.reason_against(address) for address in found}
        against = "; ".join(f"{key} is {value}" for key, value in reasons.items() if value)
        return [address for address, reason in reasons.items() if not reason], against

    def _refuse(self, goal: Goal, reason: str) -> None:
        self._report(Denied("tcp", goal.address, goal.port, goal.name, reason))


def _sockets_on_one_port(opened: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Return a socket for datagrams, and one that listens."""
    for attempt in range(1, ATTEMPTS + 1):
        listener = socket.create_server((str(LOOPBACK), 0))
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            datagrams.bind(listener.getsockname())
        except OSError:
            listener.close()
            datagrams.close()
            if attempt == ATTEMPTS:
                raise
        else:
            return opened.enter_context(datagrams), opened.enter_context(listener)
    raise AssertionError
