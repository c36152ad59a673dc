"""The mode `restricted` with names, with a small program in the place of QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from smolvm_async import InternetSettings
from smolvm_async.foundation.process import Child, spawn
from smolvm_async.qemu.internet import gateway, lookup, relay
from smolvm_async.qemu.internet.denials import Denied
from smolvm_async.qemu.internet.names import SYNTHETIC, Names
from smolvm_async.qemu.internet.policy import Address
from smolvm_async.qemu.internet.service import Internet
from tests.unit.test_guard import PROGRAM

pytestmark = pytest.mark.anyio

# The servers of the tests listen on addresses of the loopback, which the policy has to allow.
SERVERS = "127.0.1.0/24"
SETTINGS = {"allowed_domains": ["a.org", "*.b.org"], "allowed_cidrs": [SERVERS]}

# Ask a DNS server; say the address, the number of records (0), or the code of the failure.
ASK = """
import struct

def query(name, kind=1):
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + labels + struct.pack(">BHH", 0, kind, 1)

def meaning(answer):
    if answer[3] & 15 or not answer[7]:
        return answer[3] & 15
    return socket.inet_ntoa(answer[-4:])

def ask(name, kind=1, server="192.0.2.53", family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_DGRAM) as asker:
        asker.sendto(query(name, kind), (server, 53))
        select.select([asker], [], [])
        answer, source = asker.recvfrom(2000)
        assert source[:2] == (server, 53)
        return meaning(answer)

def ask_tcp(name, kind=1):
    assert tcp("192.0.2.53", 53) == "connected"
    connection.setblocking(True)
    connection.sendall(struct.pack(">H", len(query(name, kind))) + query(name, kind))
    return meaning(connection.recv(2000)[2:])

def talk(name, port, data):
    if tcp(ask(name), port) != "connected":
        return "ended"
    connection.setblocking(True)
    try:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
    except OSError:
        return "ended"
"""


class Guest:
    """A program with the network of a guest."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.denied: list[Denied] = []
        self.settings = InternetSettings(**SETTINGS)
        self.children: list[Child] = []

    async def start(self, code: str) -> Child:
        argv = [sys.executable, "-I", "-S", "-c", PROGRAM + ASK + code]
        log, spawner = self.directory / "log", self.internet.spawner
        child = await spawn("it", argv, cwd=self.directory, log=log, fds=[], spawner=spawner)
        self.children.append(child)
        return child

    async def say(self, code: str) -> list[str]:
        """Run a program, and return the lines that it says."""
        child = await self.start(code)
        await asyncio.wait([child.exited])
        assert child.returncode == 0, child.report()
        return child.log.text().splitlines()

    async def said(self, child: Child, lines: int) -> list[str]:
        """Wait until a program has said so many lines."""
        while len(child.log.text().splitlines()) < lines:
            assert not child.ended, child.report()
            await asyncio.sleep(0.01)
        return child.log.text().splitlines()

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[Guest]:
        async with Internet(self.settings, self.denied.append) as self.internet:
            yield self
            for child in self.children:
                await child.reap()
        guard = self.internet._guard._thread
        assert guard is not None
        await asyncio.to_thread(guard.join, 20)


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    before = set(threading.enumerate())
    async with Guest(tmp_path).begin() as guest:
        yield guest
    assert not [
        thread for thread in set(threading.enumerate()) - before if thread.name == "smolvm-gateway"
    ]


@pytest.fixture(autouse=True)
def zone(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The names that the host resolves."""
    zone = {"a.org": ["127.0.1.1"]}

    def look_up(name: str) -> list[Address]:
        if name == "broken.b.org":
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [ip_address(address) for address in zone.get(name, ())]

    monkeypatch.setattr(lookup, "_look_up", look_up)
    return zone


@contextlib.contextmanager
def server(
    answer: Callable[[socket.socket], object], address: str = "127.0.1.1", port: int = 0
) -> Iterator[int]:
    """Serve each connection in a thread; yield the port."""
    open_ones: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                open_ones.append(listener.accept()[0])
                begin(one, open_ones[-1])

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            answer(connection)

    def begin(target: Callable[..., None], *arguments: object) -> None:
        threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        threads[-1].start()

    with socket.create_server((address, port)) as listener:
        begin(serve)
        yield listener.getsockname()[1]
        for each in listener, *open_ones:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(20)


def echo(connection: socket.socket) -> None:
    """Send back everything that comes, with the own address before it."""
    connection.sendall(f"{connection.getsockname()[0]}: ".encode())
    while data := connection.recv(1 << 16):
        connection.sendall(data)


async def test_every_dns_query_is_answered_here(guest: Guest, zone: dict[str, list[str]]) -> None:
    zone["x.b.org"] = ["127.0.1.2"]
    said = await guest.say("""
a, x = ask("a.org"), ask("x.b.org")
say(a)
say(x)
say(ask("A.ORG", 255) == a, ask_tcp("a.org") == a, ask("x.b.org") == x)
say(ask("a.org", server="::1", family=socket.AF_INET6) == a)
say(ask("a.org", 28), ask("a.org", 16), ask("a.org", 65), ask_tcp("a.org", 28))
say(ask("b.org"), ask("org"), ask("gone.b.org"), ask_tcp("c.org"), ask("broken.b.org"))
""")
    first, second = map(ip_address, said[:2])
    assert {first, second} < set(SYNTHETIC)
    assert said[2:] == ["True True True", "True", "0 0 0 0", "3 3 3 3 2"]
    denied = [(each.protocol, each.address, each.name) for each in guest.denied]
    assert denied == [("dns", None, name) for name in ("b.org", "org", "c.org")]


async def test_malformed_queries_stop_nothing(guest: Guest) -> None:
    said = await guest.say("""
good = query("a.org")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
    for bad in [b"", b"x", bytes(12), b"\\xff" * 12, good[:-1], good + b"more", os.urandom(600),
                good[:2] + b"\\x81\\x80" + good[4:], good[:12] + b"\\xc0\\x0c\\0\\1\\0\\1",
                good[:2] + b"\\x28" + good[3:], good[:12] + b"\\x3fshort"]:
        asker.sendto(bad, ("192.0.2.53", 53))
say(tcp("192.0.2.53", 53))
connection.send(b"\\xff\\xffshort")
say(ask("a.org") == ask_tcp("a.org"))
""")
    assert said == ["connected", "True"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1", "127.0.0.1 is this host's loopback"),
        ("::ffff:127.0.0.1", "127.0.0.1 is this host's loopback"),
        ("169.254.169.254", "169.254.169.254 is a link-local or metadata address"),
        ("10.9.8.7", "10.9.8.7 is a private address, which allowed_cidrs does not have"),
    ],
)
async def test_a_name_with_a_forbidden_address_does_not_exist(
    guest: Guest, zone: dict[str, list[str]], address: str, reason: str
) -> None:
    zone["a.org"] = [str(lookup._unmapped(ip_address(address)))]
    assert await guest.say("say(ask('a.org'))") == ["3"]
    assert guest.denied == [Denied("dns", None, 0, "a.org", reason)]


async def test_the_real_address_is_chosen_at_each_connection(
    guest: Guest, zone: dict[str, list[str]]
) -> None:
    with server(echo) as port, server(echo, "127.0.1.2", port):
        child = await guest.start(f"""
address = ask("a.org")
ask = lambda name: address
for _ in range(4):
    say(talk("a.org", {port}, b"hello"))
    while not os.path.exists(f"{{_}}"):
        time.sleep(0.001)
""")
        said = await guest.said(child, 1)
        zone["a.org"] = ["127.0.1.9", "127.0.1.2"]  # nobody listens at the first
        (guest.directory / "0").touch()
        await guest.said(child, 2)
        zone["a.org"] = ["127.0.0.1"]
        (guest.directory / "1").touch()
        await guest.said(child, 3)
        zone["a.org"] = []
        (guest.directory / "2").touch()
        said = await guest.said(child, 4)
    assert said == ["b'127.0.1.1: hello'", "b'127.0.1.2: hello'", "ended", "ended"]
    (denied,) = guest.denied
    assert denied[:4] == ("tcp", Names().address_of("a.org", []), port, "a.org")
    assert denied.reason == "127.0.0.1 is this host's loopback"


def hello(name: str) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    sent = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name).do_handshake()
    return sent.read()


REQUEST = b"GET / HTTP/1.1\r\nHost: a.org\r\n\r\n"


async def test_a_client_that_states_another_name_is_refused(guest: Guest) -> None:
    received: list[bytes] = []

    def record(connection: socket.socket) -> None:
        data = b""
        while part := connection.recv(1 << 16):
            data += part
        received.append(data)
        connection.sendall(b"done")

    other = REQUEST.replace(b"a.org", b"secret.org")
    bad = [other, b"\n" + other, hello("secret.org"), hello("a.org")[:9], other[:-2], REQUEST[:-1]]
    good = [REQUEST, hello("a.org"), b"\x00binary", b"text", b""]
    with server(record) as port:
        said = await guest.say(f"for data in {bad + good}: say(talk('a.org', {port}, data))")
    assert said == ["ended"] * len(bad) + ["b'done'"] * len(good)
    assert [data for data in received if data] == good[:-1]
    assert [denied.name for denied in guest.denied] == ["a.org"] * len(bad)
    assert "'secret.org'" in guest.denied[0].reason


def end_first(connection: socket.socket) -> None:
    connection.sendall(b"bye")
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)


@pytest.mark.parametrize(("constant", "most"), [("GREETING", 0.1), ("PIECES", 1)])
async def test_a_greeting_that_never_ends_is_refused(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, constant: str, most: float
) -> None:
    monkeypatch.setattr(relay, constant, most)
    received: list[bytes] = []
    with server(lambda connection: received.append(connection.recv(9))) as port:
        code = f"""
tcp(ask("a.org"), {port})
connection.setblocking(True)
connection.send({REQUEST[:-2]!r})
say(failure(lambda: connection.recv(1)))
"""
        assert await guest.say(code) == ["ECONNRESET"]
    while not guest.denied:  # is reported after the reset
        await asyncio.sleep(0.01)
    assert [denied.name for denied in guest.denied] == ["a.org"]
    assert not any(received)


async def test_a_server_may_speak_first_and_each_end_may_end_first(guest: Guest) -> None:
    with server(echo) as port:
        said = await guest.say(f"""
tcp(ask("a.org"), {port})
connection.setblocking(True)
say(connection.recv(99))
data = os.urandom(1 << 24)
import threading
def send():
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
threading.Thread(target=send).start()
say(b"".join(iter(lambda: connection.recv(1 << 16), b"")) == data)
""")
    assert said == ["b'127.0.1.1: '", "True"]
    with server(end_first) as port:
        assert await guest.say(f"say(talk('a.org', {port}, b'\\0'))") == ["b'bye'"]


async def test_nobody_else_can_use_the_relay(guest: Guest) -> None:
    assert guest.internet._gateway is not None
    to = ("127.0.0.1", guest.internet._gateway.services.relay)
    with server(echo):
        for source in "127.0.0.1", "127.0.0.2":
            stranger = socket.create_connection(to, source_address=(source, 0))
            with stranger:
                assert await asyncio.to_thread(stranger.recv, 9) == b""


async def test_datagrams_reach_a_name(guest: Guest, zone: dict[str, list[str]]) -> None:
    zone["v6.b.org"] = ["2001:db8::1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echoing:
        echoing.bind(("127.0.1.1", 0))
        port = echoing.getsockname()[1]

        def answer() -> None:
            question, sender = echoing.recvfrom(100)
            echoing.sendto(question.upper(), sender)

        asyncio.get_running_loop().add_reader(echoing.fileno(), answer)
        said = await guest.say(f"""
a = ask("a.org")
say(udp(a, {port}) == ("QUESTION", a, {port}), udp(ask("v6.b.org"), 9))
""")
        asyncio.get_running_loop().remove_reader(echoing.fileno())
    assert said == ["True ECONNREFUSED"]
    assert guest.denied[0].name == "v6.b.org"


async def test_a_change_of_the_policy_ends_connections_that_it_refuses(
    guest: Guest, zone: dict[str, list[str]]
) -> None:
    zone["x.b.org"] = ["127.0.1.1"]
    with server(echo) as port:
        child = await guest.start(f"""
def hold(name):
    say(tcp(ask(name), {port}))
    held.append(connection)
    connection.setblocking(True)
    connection.recv(99)

def alive(connection):
    try:
        connection.sendall(b"x")
        return connection.recv(9) == b"x"
    except OSError:
        return False

held = []
hold("a.org")
hold("x.b.org")
for turn in range(3):
    while not os.path.exists(f"{{turn}}"):
        time.sleep(0.001)
    say(*map(alive, held))
say(tcp(ask("x.b.org"), {port}))
""")
        await guest.said(child, 2)
        allowed = {"allowed_domains": ["*.b.org"], "allowed_cidrs": [SERVERS]}
        changes = [allowed, {"allowed_domains": ["a.org"]}, SETTINGS]
        for turn, change in enumerate(changes):
            await guest.internet.change(InternetSettings(**change))
            (guest.directory / str(turn)).touch()
            said = await guest.said(child, 3 + turn)
        await asyncio.wait([child.exited])
        said = child.log.text().splitlines()
    assert said[2:] == ["False True", "False False", "False False", "connected"]


async def test_the_mode_can_change_while_the_guest_runs(tmp_path: Path) -> None:
    guest = Guest(tmp_path)
    guest.settings = InternetSettings()
    with server(echo) as port:
        async with guest.begin():
            assert guest.internet._gateway is None
            await guest.internet.change(InternetSettings(**SETTINGS))
            code = f"say(talk('a.org', {port}, b'hello'))"
            assert await guest.say(code) == ["b'127.0.1.1: hello'"]
            address = Names().address_of("a.org", [])
            await guest.internet.change(InternetSettings(mode="off"))
            assert await guest.say(f"say(tcp('{address}', {port}))") == ["refused"]
            await guest.internet.change(InternetSettings(**SETTINGS))
            assert await guest.say(code) == ["b'127.0.1.1: hello'"]


async def test_a_blocked_event_loop_stops_no_guest(guest: Guest) -> None:
    with server(echo) as port:
        child = await guest.start(f"say(talk('a.org', {port}, b'hello'))")
        deadline = time.monotonic() + 60
        while os.waitid(os.P_PID, child.identity.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert time.monotonic() < deadline  # the loop runs no callback meanwhile
        await asyncio.wait([child.exited])
    assert child.log.text() == "b'127.0.1.1: hello'\n"


async def test_the_network_ends_while_lookups_and_connections_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, waiting = threading.Event(), threading.Event()
    quick = lookup._look_up

    def slow(name: str) -> object:
        if name == "a.org":
            return quick(name)
        waiting.set()
        go_on.wait(60)
        return ()

    monkeypatch.setattr(lookup, "_look_up", slow)
    with server(echo) as port:
        async with Guest(tmp_path).begin() as guest:
            child = await guest.start(f"tcp(ask('a.org'), {port}); say(1); ask('slow.b.org')")
            await asyncio.to_thread(waiting.wait, 60)
            started = time.monotonic()
        assert time.monotonic() - started < gateway.PATIENCE
        assert child.ended
    go_on.set()
    while any(thread.name == "smolvm-lookup" for thread in threading.enumerate()):
        await asyncio.sleep(0.01)


async def test_one_guest_does_not_take_all_descriptors(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    with server(echo) as port:
        said = await guest.say(f"""
address, held = ask("a.org"), []
def opened():
    tcp(address, {port})
    held.append(connection)
    connection.setblocking(True)
    return failure(lambda: connection.recv(9))
say(*[opened() for _ in range(4)])
for each in held:
    each.close()
while opened() != "done":
    pass
""")
    assert said == ["done done done ECONNRESET"]
    assert guest.denied[0].reason == relay.TOO_MANY


async def test_many_guests_have_policies_of_their_own(
    tmp_path: Path, zone: dict[str, list[str]]
) -> None:
    zone.update({f"{number}.org": ["127.0.1.1"] for number in range(32)})
    with server(echo) as port:
        async with contextlib.AsyncExitStack() as opened:
            guests = []
            for number in range(32):
                guest = Guest(tmp_path)
                allowed = [f"{number}.org"]
                guest.settings = InternetSettings(allowed_domains=allowed, allowed_cidrs=[SERVERS])
                guests.append(await opened.enter_async_context(guest.begin()))
            for number in 0, 31:
                other = (number + 1) % 32
                code = f"say(talk('{number}.org', {port}, b'hello'), ask('{other}.org'))"
                assert await guests[number].say(code) == ["b'127.0.1.1: hello' 3"]
