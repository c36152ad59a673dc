"""The guard of one VM: it makes QEMU's calls to the network in QEMU's place, or refuses them.

Two threads work for a guard. The spawner's thread has the seccomp filter and spawns QEMU and the
sidecars, which inherit the filter. The answering thread has no filter. It answers also while the
event loop is blocked, and as long as a process with the filter lives, so no process ever waits in
vain. If it fails, the kernel refuses the calls.

The filter does not select sendmsg(2), which QEMU's monitor needs: QEMU's network does not use it.
So the guard holds guests, and not a QEMU that a guest has taken over.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from smolvm_async.foundation.fork import close_private, private
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.process import Spawner
from smolvm_async.foundation.tasks import no_thread
from smolvm_async.host import seccomp
from smolvm_async.host.seccomp import Call
from smolvm_async.qemu.internet import sockets
from smolvm_async.qemu.internet.denials import Bucket, Denied, Reports
from smolvm_async.qemu.internet.policy import Policy, Transport
from smolvm_async.qemu.internet.sockets import SocketAddress

logger = get_logger(__name__)

PROTOCOLS: dict[int, Transport] = {
    socket.IPPROTO_TCP: "tcp",
    socket.IPPROTO_UDP: "udp",
    socket.IPPROTO_ICMP: "icmp",
    socket.IPPROTO_ICMPV6: "icmp",
}
UNSIGNED = 0xFFFFFFFF  # the kernel ignores the upper half of an argument of the type int
DATAGRAM = 65536  # bytes; no datagram is larger

# Without the right to send ICMP, QEMU's network sends each ping as this text to a UDP port.
PING, ECHO = b"This is a pseudo-PING packet used by Slirp", 7

# Numbers to remember. A guest can exceed all of them.
THREADS = 64  # that have made a call
SOCKETS, SOURCES = 4096, 64  # with rewritten datagrams, and rewritten addresses of one socket
CONNECTIONS = 4096  # before those that are closed are forgotten

# If connect(2) is refused at once, QEMU's network frees the packet twice, and QEMU's heap breaks:
# tcp_input() of libslirp 4.7, after tcp_respond(). So a refused connection looks as if it began.
# The next poll(2) of the socket, which was never connected, tells its end, and the guest gets a
# reset.
REFUSED_LATER = errno.EINPROGRESS

# With systemd-run, which limits a VM's memory and processors, QEMU's process asks the bus for its
# limits before it executes QEMU.
BUS_CLIENT = "systemd-run"

# A flood of refused packets costs some 30 % of a processor for a moment, then 5 %.
UNPUNISHED, PER_SECOND = 500, 50  # refusals at once, and those that are forgiven in a second
PAUSE = 20  # after more, wait for so many times the time that a refusal takes

PATIENCE = 10.0  # seconds for the answering thread to see that all processes have ended
ERRORS = 10  # of the policy to log in a second


class Connection(NamedTuple):
    """A TCP connection: where the guest wanted to go, and where it really goes."""

    wanted: SocketAddress
    real: SocketAddress


class Guard:
    """Makes the calls of a VM's processes to the network, by a policy.

    Attributes:
        spawner: Spawns the VM's processes, after `start`.

    Args:
        policy: Decides about each connection and datagram; called in a thread.
        on_denied: Called in the event loop after a refusal, at most 10 times a second.
    """

    def __init__(self, policy: Policy, on_denied: Callable[[Denied], None]) -> None:
        self.spawner = Spawner()
        self._policy = policy
        self._reports = Reports(on_denied)
        self._listener = -1
        self._thread: threading.Thread | None = None  # answers
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()  # the answering thread has left nothing
        self._at_work = threading.Lock()  # held while a call is made, and while the policy changes
        self._processes: dict[int, tuple[int, int]] = {}  # by thread: id and pidfd of the process
        self._connections: dict[int, Connection] = {}  # by the socket's cookie
        self._most_connections = CONNECTIONS
        self._changed = False  # datagrams may come from a source that an earlier policy allowed
        # By the socket's cookie and the real address: the address that the guest had sent to.
        self._sources: dict[int, dict[SocketAddress, bytes]] = {}
        self._unpunished = Bucket(UNPUNISHED, PER_SECOND)
        self._errors = Bucket(ERRORS, ERRORS)

    async def start(self) -> None:
        """Start both threads. See `seccomp.check_seccomp` for the other calls of a guard.

        Raises:
            HostError: The host refuses the filter, or cannot start a thread.
            OSError: The host lacks memory or descriptors now.
        """
        try:
            self.spawner.run(self._install)
        except OSError as error:
            raise seccomp.refused(error) from error
        self._thread = threading.Thread(target=self._serve, name="smolvm-guard", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread = None
            raise no_thread(error) from error

    def _install(self) -> None:
        self._listener = private(seccomp.install())

    def report(self, denied: Denied) -> None:
        """Report a refusal, in any thread, or count it if there are too many."""
        self._reports.report(denied)

    def set_policy(self, policy: Policy) -> None:
        """Change the policy, and end the connections that it refuses. Call this in a thread.

        Afterwards, no call is under way by the old policy.
        """
        with self._at_work:
            self._policy, self._changed = policy, True
            for fd, number in self._open_sockets():
                if (connection := self._connections.get(number)) is not None:
                    verdict = policy.decide("tcp", *connection.wanted)
                    if (verdict.address, verdict.port) != connection.real:
                        sockets.end(fd)

    async def close(self) -> None:
        """End both threads, after QEMU has ended."""
        self.spawner.close()
        if self._thread is not None:
            with contextlib.suppress(TimeoutError):  # a process with the filter still lives
                async with asyncio.timeout(PATIENCE):
                    await self._ended.wait()
        elif self._listener >= 0:
            close_private(self._listener)
        self._forget_processes()

    def _forget_processes(self) -> None:
        with self._at_work:
            for _, pidfd in self._processes.values():
                close_private(pidfd)
            self._processes.clear()

    # The rest runs in the answering thread.

    def _serve(self) -> None:
        try:
            while True:
                if (call := seccomp.receive(self._listener)) is not None:
                    self._answer(call)
        except EOFError:  # all processes with the filter have ended
            self._forget_processes()
        except BaseException:  # a change of the policy still finds the connections of the processes
            logger.exception("the guard has failed: the guest can make no new connections")
        finally:
            close_private(self._listener)
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self._ended.set)

    def _answer(self, call: Call) -> None:
        started = time.thread_time()
        result: int | None = 0
        error, punish = 0, False
        try:
            with self._at_work:
                result = self._make(call)
        except _DeniedError as denied:
            error, punish = errno.ECONNREFUSED, not self._unpunished.take()
            self.report(denied.what)
        except OSError as failure:
            error = failure.errno or errno.EPERM
        except Exception:
            error, punish = errno.EPERM, not self._unpunished.take()
            if self._errors.take():
                logger.exception("the guard could not decide, and refuses the packet")
        if error == errno.ECONNREFUSED and call.number == seccomp.this_machine().connect:
            error = REFUSED_LATER
        if punish:
            time.sleep(PAUSE * (time.thread_time() - started))
        seccomp.answer(self._listener, call, result, error)

    def _make(self, call: Call) -> int | None:
        """Make a call in QEMU's place and return its result; `None` lets QEMU make the call."""
        machine = seccomp.this_machine()
        if call.number == machine.recvfrom and not (self._sources or self._changed):
            return None
        with self._descriptor(call) as fd:
            if call.number == machine.recvfrom:
                return self._receive(call, fd)
            return self._connect_or_send(call, fd, call.number == machine.connect)

    def _connect_or_send(self, call: Call, fd: int, connect: bool) -> int:
        at, size = call.arguments[1:3] if connect else call.arguments[4:6]
        packed = seccomp.read_memory(call.thread, at, min(size & UNSIGNED, sockets.LARGEST))
        to = sockets.unpack(packed)
        if to is None:
            if connect and _is_bus_client(call.thread):
                return sockets.connect(fd, packed)
            raise PermissionError(errno.EACCES, "neither IPv4 nor IPv6")
        protocol = PROTOCOLS.get(sockets.protocol(fd))
        if protocol is None or (protocol == "tcp" and (not connect or sockets.waits(fd))):
            raise PermissionError(errno.EPERM, "not a call of QEMU's network")
        if protocol == "icmp":
            to = to._replace(port=0)  # it was the number of the ping
        verdict = self._policy.decide(protocol, *to)
        if verdict.address is None:
            if to.port == ECHO and not connect and _is_ping(call):
                protocol, to = "icmp", to._replace(port=0)
            asked = verdict.asked or to.address
            raise _DeniedError(Denied(protocol, asked, to.port, verdict.name, verdict.reason))
        real = SocketAddress(verdict.address, verdict.port)
        goal = packed if real == to else sockets.pack(real, sockets.family(packed))
        data = b"" if connect else seccomp.read_memory(call.thread, *call.arguments[1:3])
        seccomp.check_waiting(self._listener, call)
        if protocol == "tcp":
            self._remember_connection(sockets.cookie(fd), Connection(to, real))
            if verdict.announce is not None:
                verdict.announce(sockets.bind_to_loopback(fd, sockets.family(packed)))
        elif real != to:
            self._remember_source(sockets.cookie(fd), real, packed)
        if connect:
            return sockets.connect(fd, goal)
        return sockets.send(fd, data, call.arguments[3] & UNSIGNED, goal)

    def _receive(self, call: Call, fd: int) -> int | None:
        """Receive a datagram, and name the source that the guest had sent to.

        Raises:
            BlockingIOError: The guest may not send to this source, and the datagram is dropped.
        """
        if sockets.protocol(fd) != socket.IPPROTO_UDP:
            return None
        sources = self._sources.get(sockets.cookie(fd), {})
        _, at, size, flags, sender_at, length_at = call.arguments
        length = int.from_bytes(seccomp.read_memory(call.thread, length_at, 4), "little")
        seccomp.check_waiting(self._listener, call)
        count, data, sender = sockets.receive(fd, min(size, DATAGRAM), flags & UNSIGNED)
        real = sockets.unpack(sender)
        if real is not None:
            sender = sources.get(real, sender)
            wanted = sockets.unpack(sender) or real
            if self._policy.decide("udp", *wanted)[:2] != real:
                raise BlockingIOError(errno.EAGAIN, "a source that the policy shuts")
        if data:
            seccomp.write_memory(call.thread, at, data)
        seccomp.write_memory(call.thread, sender_at, sender[:length])
        seccomp.write_memory(call.thread, length_at, len(sender).to_bytes(4, "little"))
        return count

    def _remember_connection(self, number: int, connection: Connection) -> None:
        if len(self._connections) >= self._most_connections:
            alive = {number for _, number in self._open_sockets()}
            kept = {key: value for key, value in self._connections.items() if key in alive}
            self._connections = kept
            self._most_connections = max(CONNECTIONS, 2 * len(kept))
        self._connections[number] = connection

    def _remember_source(self, number: int, real: SocketAddress, wanted: bytes) -> None:
        sources = self._sources.pop(number, {})  # the latest is the last
        sources.pop(real, None)
        sources[real] = wanted
        self._sources[number] = sources
        if len(sources) > SOURCES:
            del sources[next(iter(sources))]
        if len(self._sources) > SOCKETS:
            del self._sources[next(iter(self._sources))]

    @contextlib.contextmanager
    def _descriptor(self, call: Call) -> Iterator[int]:
        fd = self._take(call.thread, call.arguments[0] & UNSIGNED)
        try:
            yield fd
        finally:
            sockets.close(fd)

    def _take(self, thread: int, number: int) -> int:
        """Return a duplicate of a descriptor of a thread."""
        if thread in self._processes:
            try:
                return seccomp.take_descriptor(self._processes[thread][1], number)
            except ProcessLookupError:  # another thread has this id now
                close_private(self._processes.pop(thread)[1])
        if len(self._processes) >= THREADS:
            oldest = next(iter(self._processes))
            close_private(self._processes.pop(oldest)[1])
        pid, pidfd = seccomp.find_process(thread)
        self._processes[thread] = pid, private(pidfd)
        return seccomp.take_descriptor(pidfd, number)

    def _open_sockets(self) -> Iterator[tuple[int, int]]:
        """Yield a duplicate of each socket of the VM's processes, and the socket's cookie."""
        for pid, pidfd in dict(self._processes.values()).items():
            with contextlib.suppress(OSError):  # the process has ended
                for name in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):  # not a socket, or closed meanwhile
                        fd = seccomp.take_descriptor(pidfd, int(name))
                        try:
                            yield fd, sockets.cookie(fd)
                        finally:
                            sockets.close(fd)


class _DeniedError(Exception):
    def __init__(self, what: Denied) -> None:
        self.what = what


def _is_ping(call: Call) -> bool:
    """Return whether a call sends a ping as a datagram."""
    return seccomp.read_memory(call.thread, call.arguments[1], len(PING)) == PING


def _is_bus_client(thread: int) -> bool:
    return os.path.basename(os.readlink(f"/proc/{thread}/exe")) == BUS_CLIENT
