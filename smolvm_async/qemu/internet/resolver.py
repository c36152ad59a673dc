"""The DNS server of a `restricted` guest: all queries reach it, for whatever server they are meant.

An allowed name has one record of the type A, with a synthetic address, if it has a real address
that the guest may reach. Such a name has no other records. All other names do not exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from smolvm_async.foundation.log import get_logger
from smolvm_async.qemu.internet.denials import Bucket

logger = get_logger(__name__)

TTL = 10  # seconds; the guest asks again soon after a change of the policy
DATAGRAM = 512  # bytes of an answer, unless the query allows more: RFC 1035, 4.2.1
LARGEST_DATAGRAM = 1232  # bytes, which fit into a packet of IPv6
LARGEST = 65535  # bytes of a message over TCP
CONNECTIONS, IDLE = 64, 10.0  # at once, and the seconds for a query on a connection
QUERIES = 512  # that wait for their answers; a guest asks again for those that are dropped

# A flood of queries costs this thread about a tenth of a processor, and the guard two tenths more.
AT_ONCE, PER_SECOND = 2000, 400  # queries
REST = 0.05  # seconds to read no queries, after a flood


# Returns the synthetic address of an allowed name; `None` if the name does not exist for the guest.
# Raises an OSError if it cannot tell.
Resolve = Callable[[str], Awaitable[IPv4Address | None]]


class Resolver:
    """Answers queries that come to a port of 127.0.0.1.

    Args:
        allows: Returns whether a name is allowed, and reports a name that is not.
        resolve: Looks an allowed name up.
    """

    def __init__(self, allows: Callable[[str], bool], resolve: Resolve) -> None:
        self._allows = allows
        self._resolve = resolve
        self._bucket = Bucket(AT_ONCE, PER_SECOND)
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()  # keeps them alive

    async def serve_datagrams(self, sock: socket.socket) -> None:
        """Answer queries over UDP, for ever."""
        loop = asyncio.get_running_loop()

        async def reply(query: bytes, sender: tuple[str, int]) -> None:
            answer = await self.answer(query, DATAGRAM)
            with contextlib.suppress(OSError):
                if answer is not None:
                    await loop.sock_sendto(sock, answer, sender)

        while True:
            with contextlib.suppress(OSError):
                query, sender = await loop.sock_recvfrom(sock, LARGEST)
                if len(self._tasks) < QUERIES:
                    task = loop.create_task(reply(query, sender))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            await self._rest()

    async def serve_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer the queries of one connection, one after the other."""
        # asyncio logs the cancellation of such a task, at the end, as an error.
        ends = (OSError, EOFError, asyncio.CancelledError)
        self._connections += 1
        with contextlib.closing(writer), contextlib.suppress(*ends):
            while self._connections <= CONNECTIONS:
                async with asyncio.timeout(IDLE):
                    size = int.from_bytes(await reader.readexactly(2), "big")
                    query = await reader.readexactly(size)
                await self._rest()
                answer = await self.answer(query, LARGEST)
                if answer is None:
                    break
                writer.write(len(answer).to_bytes(2, "big") + answer)
                async with asyncio.timeout(IDLE):
                    await writer.drain()
        self._connections -= 1

    async def _rest(self) -> None:
        """Leave queries to the kernel, which drops them, if there were too many."""
        if not self._bucket.take():
            await asyncio.sleep(REST)

    async def answer(self, wire: bytes, size: int) -> bytes | None:
        """Return the answer to a query, at most `size` bytes; `None` if there is no answer."""
        try:
            query = dns.message.from_wire(wire)
            if query.flags & dns.flags.QR:
                return None  # an answer to an answer could go on for ever
            response = await self._respond(query)
            if size == DATAGRAM:
                size = min(max(query.payload, DATAGRAM), LARGEST_DATAGRAM)
            return response.to_wire(max_size=size)
        except dns.exception.TooBig:
            return None
        except Exception as error:  # a guest can send anything
            logger.debug("a DNS query is malformed: %r", error)
            return _format_error(wire)

    async def _respond(self, query: dns.message.Message) -> dns.message.Message:
        response = dns.message.make_response(query, recursion_available=True)
        if query.opcode() != dns.opcode.QUERY:
            response.set_rcode(dns.rcode.NOTIMP)
        elif len(query.question) != 1 or query.question[0].rdclass != dns.rdataclass.IN:
            response.set_rcode(dns.rcode.REFUSED)
        else:
            await self._fill(response, query.question[0])
        return response

    async def _fill(self, response: dns.message.Message, question: dns.rrset.RRset) -> None:
        name = question.name.to_text(omit_final_dot=True).lower()
        try:
            if not self._allows(name):
                response.set_rcode(dns.rcode.NXDOMAIN)
            elif question.rdtype in (dns.rdatatype.A, dns.rdatatype.ANY):
                address = await self._resolve(name)
                if address is None:
                    response.set_rcode(dns.rcode.NXDOMAIN)
                else:
                    record = dns.rrset.from_text(question.name, TTL, "IN", "A", str(address))
                    response.answer.append(record)
        except OSError as error:
            logger.info("%s could not be looked up: %s", name, error)
            response.set_rcode(dns.rcode.SERVFAIL)


def _format_error(wire: bytes) -> bytes | None:
    """Return the answer to a malformed query: its id, and the code FORMERR."""
    if len(wire) < 12 or wire[2] & 0x80:
        return None
    return wire[:2] + bytes([0x80 | wire[2] & 0x79, dns.rcode.FORMERR]) + bytes(8)
