"""The relay: makes the TCP connections of a `restricted` guest to names.

The guard sends each connection to a synthetic address here, and tells the local port from which the
connection comes; the relay closes all others. It looks the name up again for each connection, and
holds the first bytes of the guest back until they state no other name than the one that the guest
has asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import struct
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence

from smolvm_async.foundation.fork import private
from smolvm_async.foundation.log import get_logger
from smolvm_async.qemu.internet.first_packet import (
    LARGEST,
    BadGreetingError,
    IncompleteError,
    at_end,
    is_harmless,
    stated_names,
)
from smolvm_async.qemu.internet.names import Goal
from smolvm_async.qemu.internet.policy import LOOPBACK, Address

logger = get_logger(__name__)

EXPECTED = 4096  # connections that the guard has announced and that have not come yet
SMALL, LARGE = 1 << 14, 1 << 19  # bytes that a direction holds, at first and if it is fast
CONNECT = 5.0  # seconds for a connection to one address
ADDRESSES = 4  # to try
GREETING = 30.0  # seconds for a greeting that is held back
PIECES = 1024  # of a greeting
NO_DESCRIPTORS = 0.1  # seconds until the next try
RESET = struct.pack("ii", 1, 0)  # struct linger: close() sends a reset

TOO_MANY = "too many connections are open: for more, raise the limit of descriptors (ulimit -n)"


Find = Callable[[Goal], Awaitable[Sequence[Address]]]
Allows = Callable[[Goal, Address | None], bool]


class Relay:
    """Relays the connections that `expect` has announced.

    Args:
        find: Looks up a goal's addresses, or raises an OSError.
        allows: Returns whether a connection is allowed now; the address may not be known yet.
        refuse: Called with a goal and the reason, when a connection is refused.
    """

    def __init__(self, find: Find, allows: Allows, refuse: Callable[[Goal, str], None]) -> None:
        self._find = find
        self._allows = allows
        self._refuse = refuse
        self._expected: OrderedDict[int, Goal] = OrderedDict()  # by local port
        # The real address is `None` until the connection to the server is made.
        self._connections: dict[asyncio.Task[None], tuple[Goal, Address | None]] = {}

    def expect(self, goal: Goal, local_port: int) -> None:
        """Expect a connection from a local port; call this in any thread."""
        self._expected.pop(local_port, None)
        self._expected[local_port] = goal
        if len(self._expected) > EXPECTED:
            with contextlib.suppress(KeyError):
                self._expected.popitem(last=False)

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                guest, (host, port) = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(NO_DESCRIPTORS)
                continue
            goal = self._expected.pop(port, None) if host == str(LOOPBACK) else None
            if goal is None:
                guest.close()
            elif not _budget.take(len(self._connections)):
                self._refuse(goal, TOO_MANY)
                with contextlib.suppress(OSError), _open(guest):
                    raise ConnectionAbortedError
            else:
                task = loop.create_task(self._relay(guest, goal))
                self._connections[task] = goal, None
                task.add_done_callback(self._forget)

    async def end_refused(self) -> None:
        """Reset the connections that are not allowed any more."""
        tasks = [task for task, to in self._connections.items() if not self._allows(*to)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._connections[task]
        _budget.give_back()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a connection of the guest ended with an error", exc_info=error)

    async def _relay(self, guest: socket.socket, goal: Goal) -> None:
        try:
            with _open(guest), _open(await self._connect(goal)) as server:
                async with asyncio.TaskGroup() as directions:
                    # A server may speak first: its bytes do not wait for the guest's greeting.
                    directions.create_task(_pump(server, guest))
                    directions.create_task(self._check_and_pump(guest, server, goal))
        except* BadGreetingError as refused:
            self._refuse(goal, str(refused.exceptions[0]))
        except* OSError as failed:
            logger.debug("a connection to %s ended: %s", goal.name, failed.exceptions[0])

    async def _connect(self, goal: Goal) -> socket.socket:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        error = OSError(f"{goal.name} has no address")
        for address in (await self._find(goal))[:ADDRESSES]:
            if not self._allows(goal, address):
                continue
            self._connections[task] = goal, address
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            server = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                async with asyncio.timeout(CONNECT):
                    await loop.sock_connect(server, (str(address), goal.port))
                return server
            except BaseException as failure:
                server.close()
                if not isinstance(failure, OSError):
                    raise
                error = failure
        raise error

    async def _check_and_pump(
        self, guest: socket.socket, server: socket.socket, goal: Goal
    ) -> None:
        try:
            async with asyncio.timeout(None) as limit:
                await _greet(guest, server, goal.name, limit)
        except TimeoutError:
            raise BadGreetingError("the client's greeting takes too long") from None
        await _pump(guest, server)


async def _greet(
    guest: socket.socket, server: socket.socket, name: str, limit: asyncio.Timeout
) -> None:
    """Carry the first bytes of a client, if they state no other name.

    Raises:
        BadGreetingError: They state another name, or cannot be checked.
    """
    loop = asyncio.get_running_loop()
    greeting, sent, stated = b"", 0, None
    for _ in range(PIECES):
        piece = await loop.sock_recv(guest, LARGEST)
        greeting += piece
        with contextlib.suppress(IncompleteError):
            stated = stated_names(greeting if piece else at_end(greeting))
        if stated is None and not (piece and is_harmless(greeting)):
            if not piece:
                raise BadGreetingError("the client's greeting is not complete")
            if limit.when() is None:
                limit.reschedule(loop.time() + GREETING)
            continue
        if other := sorted((stated or set()) - {name}):
            reason = f"the client asks for {other[0]!r}, another name than it has looked up"
            raise BadGreetingError(reason)
        await loop.sock_sendall(server, greeting[sent:])
        if stated is not None:
            limit.reschedule(None)
            return
        sent = len(greeting)
    raise BadGreetingError("the client's greeting is in too many pieces")


async def _pump(source: socket.socket, goal: socket.socket) -> None:
    """Carry bytes until the end of file, and pass the end on."""
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(SMALL))
    while count := await loop.sock_recv_into(source, buffer):
        await loop.sock_sendall(goal, buffer[:count])
        if count == len(buffer) < LARGE:
            buffer = memoryview(bytearray(2 * count))
        await asyncio.sleep(0)  # neither call waits as long as both sides are fast
    goal.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def _open(sock: socket.socket) -> Iterator[socket.socket]:
    """Close a socket after the block; with a reset after an error, so that the peer sees it."""
    with sock:
        try:
            private(sock.fileno())
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield sock
        except BaseException:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            raise


class _Budget:
    """Limits the relayed connections of all VMs, which each take two descriptors.

    Together they leave half of the descriptors to this process; one VM leaves a quarter of the
    connections to the others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = 0

    def take(self, of_one: int) -> bool:
        """Take the descriptors for a connection of a VM that has `of_one` connections."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        with self._lock:
            if self._taken >= most or of_one >= most * 3 // 4:
                return False
            self._taken += 1
            return True

    def give_back(self) -> None:
        """Give the descriptors of a connection back."""
        with self._lock:
            self._taken -= 1


_budget = _Budget()
