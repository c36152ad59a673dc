"""The guard of a network, with a small program in the place of QEMU."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from smolvm_async.foundation.process import Child, Spawner, spawn
from smolvm_async.host import seccomp
from smolvm_async.qemu.internet import guard as guards
from smolvm_async.qemu.internet.denials import Denied
from smolvm_async.qemu.internet.guard import Guard
from smolvm_async.qemu.internet.policy import Address, Transport, Verdict

pytestmark = pytest.mark.anyio

NAMED, OTHER = ip_address("198.18.0.1"), ip_address("203.0.113.1")
NAMED6 = ip_address("fd00:1::1")
LOOPBACK = ip_address("127.0.0.1")

# Say what a guest's program would see; each function is one call of libslirp, or of an attacker.
PROGRAM = """
import ctypes, errno, os, select, socket, subprocess, sys, time

def tcp(address, port, family=socket.AF_INET):
    global connection
    connection = socket.socket(family)
    connection.setblocking(False)
    error = connection.connect_ex((address, port))
    if error == errno.EINPROGRESS:
        select.select([], [connection], [])
        return "connected" if failure(connection.getpeername) == "done" else "refused"
    return errno.errorcode.get(error, "connected")

def udp(address, port, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"question", (address, port))
        except OSError as error:
            return errno.errorcode[error.errno]
        select.select([sender], [], [])
        answer, source = sender.recvfrom(100)
        return answer.decode(), source[0], source[1]

def failure(work):
    try:
        work()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def syscall(number, *arguments):
    if ctypes.CDLL(None, use_errno=True).syscall(number, *arguments) < 0:
        return errno.errorcode[ctypes.get_errno()]
    return "done"

def say(*words):
    print(*words, flush=True)

"""


class Only:
    """Leads one address to servers of the test, and refuses all others."""

    def __init__(self, tcp: int = 0, udp: int = 0) -> None:
        self.ports = {"tcp": tcp, "udp": udp, "icmp": 0}
        self.announced: list[int] = []
        self.asked: list[tuple[str, str, int]] = []

    def decide(self, protocol: Transport, address: Address, port: int) -> Verdict:
        self.asked.append((protocol, str(address), port))
        if address in (NAMED, NAMED6):
            announce = self.announced.append if protocol == "tcp" else None
            return Verdict(LOOPBACK, self.ports[protocol], announce=announce)
        return Verdict(None, 0, "not the server of the test")


class Broken:
    def decide(self, protocol: Transport, address: Address, port: int) -> Verdict:
        raise ValueError("a policy with an error")


class Guarded:
    """A guard, what it reported, and the programs that it spawned."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.denied: list[Denied] = []
        self.guard = Guard(Only(), self.denied.append)
        self.children: list[Child] = []

    async def start(self, code: str) -> Child:
        argv, log = [sys.executable, "-I", "-S", "-c", PROGRAM + code], self.directory / "log"
        spawner = self.guard.spawner
        child = await spawn("it", argv, cwd=self.directory, log=log, fds=[], spawner=spawner)
        self.children.append(child)
        return child

    async def end(self) -> None:
        """End the programs, and wait for the end of the guard."""
        for child in self.children:
            await child.reap()
        await self.guard.close()
        thread = self.guard._thread
        assert thread is not None
        await asyncio.to_thread(thread.join, 20)
        assert not thread.is_alive()

    async def say(self, code: str) -> list[str]:
        """Run a program, and return the lines that it says."""
        child = await self.start(code)
        await asyncio.wait([child.exited])
        assert child.returncode == 0, child.report()
        return child.log.text().splitlines()


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    guarded = Guarded(tmp_path)
    await guarded.guard.start()
    yield guarded
    await guarded.end()


@pytest.fixture
async def only(guarded: Guarded) -> AsyncIterator[Only]:
    """A TCP server that counts, and a UDP server that answers in capitals."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(("127.0.0.1", 0))

        def answer() -> None:
            question, sender = datagrams.recvfrom(100)
            datagrams.sendto(question.upper(), sender)

        asyncio.get_running_loop().add_reader(datagrams.fileno(), answer)
        only = Only(server.getsockname()[1], datagrams.getsockname()[1])
        guarded.guard.set_policy(only)
        yield only
        asyncio.get_running_loop().remove_reader(datagrams.fileno())


async def test_a_refused_connection_ends_at_once_but_later_than_its_call(guarded: Guarded) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert await guarded.say(f"say(tcp('127.0.0.1', {port}))") == ["refused"]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert guarded.denied == [Denied("tcp", LOOPBACK, port, "", "not the server of the test", 0)]


@pytest.mark.parametrize(("address", "family"), [(NAMED, "AF_INET"), (NAMED6, "AF_INET6")])
async def test_an_allowed_connection_goes_where_the_policy_says(
    guarded: Guarded, only: Only, address: Address, family: str
) -> None:
    code = f"say(tcp('{address}', 80, socket.{family}), connection.getsockname()[1])"
    (said,) = await guarded.say(code)
    assert said == f"connected {only.announced[0]}"
    assert only.asked == [("tcp", str(address), 80)]
    assert not guarded.denied


@pytest.mark.parametrize(("address", "family"), [(NAMED, "AF_INET"), (NAMED6, "AF_INET6")])
async def test_an_answer_comes_from_the_address_that_was_asked(
    guarded: Guarded, only: Only, address: Address, family: str
) -> None:
    said = await guarded.say(f"say(*udp('{address}', 53, socket.{family}))")
    assert said == [f"QUESTION {address} 53"]


async def test_an_ipv4_address_in_ipv6s_form_is_an_ipv4_address(
    guarded: Guarded, only: Only
) -> None:
    said = await guarded.say(
        "say(tcp('::ffff:127.0.0.1', 80, socket.AF_INET6))\n"
        f"say(tcp('::ffff:{NAMED}', 80, socket.AF_INET6))"
    )
    assert said == ["refused", "connected"]
    assert [asked[1] for asked in only.asked] == ["127.0.0.1", str(NAMED)]


async def test_datagrams_and_other_sockets_are_refused(guarded: Guarded, only: Only) -> None:
    """A ping and a raw packet need a host that allows such sockets."""
    said = await guarded.say(f"""
say(udp("{OTHER}", 53))
for kind, protocol in (socket.SOCK_DGRAM, 1), (socket.SOCK_RAW, 255), (socket.SOCK_RAW, 17):
    try:
        pinger = socket.socket(socket.AF_INET, kind, protocol)
    except PermissionError:
        say("refused")
    else:
        say("refused" if failure(lambda: pinger.sendto(bytes(8), ("{OTHER}", 0))) != "done" else 0)
path = socket.socket(socket.AF_UNIX)
say(failure(lambda: path.connect("/run/bus")))
say(failure(lambda: path.connect(chr(0) + "abstract")))
datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
say(failure(lambda: datagram.sendto(b"x", "/run/bus")))
waiting = socket.socket()
say(failure(lambda: waiting.connect(("{NAMED}", 80))))
fast = socket.socket()
say(failure(lambda: fast.sendto(b"x", socket.MSG_FASTOPEN, ("{NAMED}", 80))))
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
say(failure(lambda: netlink.sendto(bytes(16), (0, 0))))
""")
    assert said[:4] == ["ECONNREFUSED", "refused", "refused", "refused"]
    assert said[4:] == ["EACCES", "EACCES", "EACCES", "EPERM", "EPERM", "EACCES"]


async def test_a_ping_is_reported_as_a_ping(guarded: Guarded) -> None:
    """Without the right to send ICMP, QEMU's network sends a text by UDP."""
    await guarded.say(f"""
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
    failure(lambda: own.sendto(b"This is a pseudo-PING packet used by Slirp to", ("{OTHER}", 7)))
    failure(lambda: own.sendto(b"x", ("{OTHER}", 7)))
try:
    own = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    failure(lambda: own.sendto(bytes(8), ("{OTHER}", 4711)))
except PermissionError:
    pass
""")
    reported = [(denied.protocol, denied.port) for denied in guarded.denied]
    assert reported[:2] == [("icmp", 0), ("udp", 7)]
    assert reported[2:] in ([("icmp", 0)], [])


async def test_calls_that_would_hide_an_address_do_not_exist(guarded: Guarded) -> None:
    numbers = seccomp.this_machine()
    code = f"""
say(syscall({numbers.sendmmsg}, 1, None, 0, 0))
say(syscall({numbers.io_uring_setup}, 8, bytes(120)))
"""
    assert await guarded.say(code) == ["ENOSYS", "ENOSYS"]


async def test_an_error_of_the_policy_refuses_the_packet(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    guarded.guard.set_policy(Broken())
    with caplog.at_level(logging.ERROR):
        assert await guarded.say(f"say(tcp('{NAMED}', 80)); say(udp('{NAMED}', 53))") == [
            "EPERM",
            "EPERM",
        ]
    assert "refuses the packet" in caplog.text
    guarded.guard.set_policy(Only())
    assert await guarded.say(f"say(tcp('{OTHER}', 80))") == ["refused"]


async def test_without_an_answering_thread_calls_fail(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Closed, not open; nor does the caller wait for ever."""

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(seccomp, "answer", fail)
    with caplog.at_level(logging.ERROR):
        said = await guarded.say(f"say(tcp('{NAMED}', 80)); say(tcp('{NAMED}', 80))")
    assert said == ["ENOSYS", "ENOSYS"]
    assert "no new connections" in caplog.text


async def test_without_an_answering_thread_a_new_policy_still_ends_connections(
    guarded: Guarded, only: Only, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = await guarded.start(f"""
tcp("{NAMED}", 80)
say(failure(lambda: socket.create_connection(("{NAMED}", 80))))
select.select([connection], [], [], 30)
say(failure(lambda: connection.send(b"x")))
""")
    answer = seccomp.answer

    def answer_once(*call: Any) -> None:
        monkeypatch.setattr(seccomp, "answer", lambda *_: 1 / 0)
        answer(*call)

    monkeypatch.setattr(seccomp, "answer", answer_once)
    while not child.log.text():
        assert not child.ended, child.report()
        await asyncio.sleep(0.01)
    await asyncio.to_thread(guarded.guard.set_policy, Only())
    await asyncio.wait([child.exited])
    assert child.log.text() == "ENOSYS\nEPIPE\n"


async def test_calls_are_answered_while_the_event_loop_is_blocked(
    guarded: Guarded, only: Only
) -> None:
    code = f"""
started = time.monotonic()
for _ in range(100):
    tcp("{NAMED}", 80)
say(time.monotonic() - started)
"""
    child = await guarded.start(code)
    deadline = time.monotonic() + 60
    while os.waitid(os.P_PID, child.identity.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        assert time.monotonic() < deadline  # the loop runs no callback meanwhile
    await asyncio.wait([child.exited])
    assert child.returncode == 0
    assert len(only.announced) == 100


class Slow(Only):
    """Decides only when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.go_on = threading.Event(), threading.Event()

    def decide(self, protocol: Transport, address: Address, port: int) -> Verdict:
        self.called.set()
        self.go_on.wait(60)
        return super().decide(protocol, address, port)


async def test_a_caller_can_be_killed_while_it_waits_for_an_answer(guarded: Guarded) -> None:
    slow = Slow()
    guarded.guard.set_policy(slow)
    child = await guarded.start(f"tcp('{OTHER}', 80)")
    await asyncio.to_thread(slow.called.wait)
    await child.reap()
    assert child.returncode == -signal.SIGKILL
    slow.go_on.set()
    guarded.guard.set_policy(Only())
    assert await guarded.say(f"say(tcp('{OTHER}', 80))") == ["refused"]


async def test_a_new_policy_ends_the_connections_that_it_refuses(
    guarded: Guarded, only: Only
) -> None:
    child = await guarded.start(f"""
tcp("{NAMED}", 80)
forwarded = socket.create_server(("127.0.0.1", 0))
say(forwarded.getsockname()[1])
accepted, _ = forwarded.accept()
say("open")
select.select([connection], [], [])
say(failure(lambda: connection.send(b"x")), tcp("{NAMED}", 80))
say(accepted.recv(9).decode())
""")

    async def said(lines: int) -> list[str]:
        while len(child.log.text().splitlines()) < lines:
            assert not child.ended, child.report()
            await asyncio.sleep(0.01)
        return child.log.text().splitlines()

    (port,) = await said(1)
    with socket.create_connection(("127.0.0.1", int(port))) as forwarded:
        await said(2)
        same = Only(only.ports["tcp"], only.ports["udp"])
        await asyncio.to_thread(guarded.guard.set_policy, same)
        await asyncio.to_thread(guarded.guard.set_policy, Only())
        assert (await said(3))[2] == "EPIPE refused"
        forwarded.send(b"alive")
        assert (await said(4))[3] == "alive"


async def test_no_datagram_comes_from_where_a_new_policy_lets_none_go(guarded: Guarded) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        allowing = Only(udp=server.getsockname()[1])
        guarded.guard.set_policy(allowing)
        child = await guarded.start(f"""
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.sendto(b"question", ("{NAMED}", 53))
for _ in range(3):
    select.select([own], [], [], 30)
    say(failure(lambda: own.recvfrom(100)))
""")
        _, guest = await asyncio.to_thread(server.recvfrom, 100)
        for number, policy in enumerate((allowing, Only(), allowing), start=1):
            await asyncio.to_thread(guarded.guard.set_policy, policy)
            server.sendto(b"answer", guest)
            while len(child.log.text().splitlines()) < number:
                assert not child.ended, child.report()
                await asyncio.sleep(0.01)
    await asyncio.wait([child.exited])
    assert child.log.text().splitlines() == ["done", "EAGAIN", "done"]


async def test_the_memory_of_a_guard_is_bounded_and_keeps_what_is_open(
    guarded: Guarded, only: Only, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "CONNECTIONS", "SOCKETS", "SOURCES":
        monkeypatch.setattr(guards, name, 32)
    guard = guarded.guard
    guard._most_connections = 32
    child = await guarded.start(f"""
tcp("{NAMED}", 80)
held = connection
for number in range(100):  # as many may wait for the server
    tcp("{NAMED}", 80)
senders = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(100)]
for sender in senders:
    sender.sendto(b"x", ("{NAMED}", 53))
for port in range(1, 101):
    sender.sendto(b"x", ("{NAMED}", port))
say("done")
select.select([held], [], [])
say(failure(lambda: held.send(b"x")))
""")
    while not child.log.text():
        assert not child.ended, child.report()
        await asyncio.sleep(0.01)
    assert len(only.announced) == 101
    assert len(guard._connections) <= 32
    assert len(guard._sources) == 32
    assert max(map(len, guard._sources.values())) <= 32
    await asyncio.to_thread(guard.set_policy, Only())
    await asyncio.wait([child.exited])
    assert child.log.text() == "done\nEPIPE\n"


async def test_reports_of_a_flood_are_few_and_count_the_rest(guarded: Guarded) -> None:
    floods = guards.UNPUNISHED // 2
    await guarded.say(f"for _ in range({floods}): udp('{OTHER}', 53)\nudp('{OTHER}', 53)")
    reported = len(guarded.denied) + sum(denied.left_out for denied in guarded.denied)
    assert reported <= floods + 1
    assert len(guarded.denied) < floods / 2


async def test_a_flood_costs_a_bounded_share_of_a_processor(guarded: Guarded) -> None:
    await guarded.say(f"for _ in range({guards.UNPUNISHED}): udp('{OTHER}', 53)")
    started, used = time.monotonic(), time.process_time()
    await guarded.say(f"for _ in range(1000): udp('{OTHER}', 53)")
    assert (time.process_time() - used) / (time.monotonic() - started) < 0.2


async def test_two_guards_have_policies_of_their_own(
    guarded: Guarded, only: Only, tmp_path: Path
) -> None:
    other = Guarded(tmp_path)
    await other.guard.start()
    try:
        code = f"say(tcp('{NAMED}', 80))"
        said, others = await asyncio.gather(guarded.say(code), other.say(code))
        assert (said, others) == (["connected"], ["refused"])
    finally:
        await other.end()


async def test_32_guards_in_one_process_have_policies_of_their_own(tmp_path: Path) -> None:
    """Each allows another address, and is judged by its own refusals."""

    class One(Only):
        def __init__(self, number: int, port: int) -> None:
            super().__init__()
            self.allowed, self.port = ip_address(f"203.0.113.{number}"), port

        def decide(self, protocol: Transport, address: Address, port: int) -> Verdict:
            if address == self.allowed:
                return Verdict(LOOPBACK, self.port)
            return Verdict(None, 0, "of another guard")

    numbers = range(1, 33)
    code = "\n".join(f"say(tcp('203.0.113.{number}', 80))" for number in numbers)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        port = server.getsockname()[1]

        async def judge(number: int) -> None:
            directory = tmp_path / str(number)
            directory.mkdir()
            other = Guarded(directory)
            await other.guard.start()
            try:
                other.guard.set_policy(One(number, port))
                said = await other.say(code)
            finally:
                await other.end()
            assert [each for each in numbers if said[each - 1] == "connected"] == [number]
            denied = {int(str(each.address).rpartition(".")[2]) for each in other.denied}
            assert denied
            assert number not in denied

        await asyncio.gather(*map(judge, numbers))


async def test_the_owners_own_connections_are_free(guarded: Guarded) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
        server.accept()[0].close()


async def test_a_fork_of_the_owner_does_not_keep_the_guard_alive(
    guarded: Guarded, only: Only
) -> None:
    listener = guarded.guard._listener
    if (pid := os.fork()) == 0:
        os._exit(os.readlink(f"/proc/self/fd/{listener}") != os.devnull)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert await guarded.say(f"say(tcp('{NAMED}', 80))") == ["connected"]


OWNER = """
import asyncio, sys
from pathlib import Path
from tests.unit.test_guard import Guarded, Slow

async def main():
    guarded, slow = Guarded(Path(sys.argv[1])), Slow()
    await guarded.guard.start()
    guarded.guard.set_policy(slow)
    child = await guarded.start("say('begins'); tcp('203.0.113.1', 80)")
    await asyncio.to_thread(slow.called.wait)
    print(child.identity.pid, flush=True)
    exec(sys.argv[2])

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "end",
    ["import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "slow.go_on.set()", "sys.exit()"],
    ids=["killed", "returns", "exits"],
)
def test_nothing_outlives_an_owner_that_did_not_close_the_guard(end: str, tmp_path: Path) -> None:
    """The caller waits for an answer when its owner ends."""
    done = subprocess.run(
        [sys.executable, "-c", OWNER, tmp_path, end],
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if "SIGKILL" in end else 0)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < deadline, "the program has outlived its owner"
        time.sleep(0.01)


def test_a_child_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """The kernel kills a child with the thread that spawned it, which is the spawner's."""
    spawner, loop, log = Spawner(), asyncio.new_event_loop(), tmp_path / "log"
    read, write = os.pipe()
    code = f"import os, time; print(os.read({read}, 9).decode(), flush=True); time.sleep(600)"
    argv = [sys.executable, "-I", "-S", "-c", code]
    starting = spawn("it", argv, cwd=tmp_path, log=log, fds=[read], spawner=spawner)

    def start() -> tuple[int, Child]:
        return threading.get_native_id(), loop.run_until_complete(starting)

    with ThreadPoolExecutor(1) as pool:
        thread, child = pool.submit(start).result()
    while Path(f"/proc/self/task/{thread}").exists():
        time.sleep(0.001)
    os.write(write, b"alive")
    while child.log.text() != "alive\n":
        assert not child.ended, child.report()
        loop.run_until_complete(asyncio.sleep(0.01))
    spawner.close()
    loop.run_until_complete(asyncio.wait([child.exited]))
    assert child.returncode == -signal.SIGKILL
    loop.close()
    os.close(read)
    os.close(write)
