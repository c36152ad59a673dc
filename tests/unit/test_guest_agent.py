"""The guest agent's channel, against a guest that is a socket and behaves as badly as it can."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from smolvm_async.errors import (
    ConnectionLostError,
    GuestAgentError,
    VMNotRunningError,
    VMTimeoutError,
)
from smolvm_async.qemu.arguments import AGENT_PORT
from smolvm_async.qemu.events import PortChanged, Reset
from smolvm_async.qemu.guest_agent import ANSWER, LIMIT, STALE, GuestAgent, result_of
from smolvm_async.qemu.pauses import Pauses

pytestmark = pytest.mark.anyio

SOON = 30.0  # seconds; an answer takes milliseconds
NEVER = 0.05  # seconds for an answer that does not come
PONG = b'{"return": {}}\n'


class Guest:
    """The guest's end of the port. Each request is answered with the next of `answers`, or `PONG`.

    A synchronization is answered, too, unless `mute` is set.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self.answers: list[bytes] = []
        self.before = b""  # comes before the next answer to a synchronization
        self.mute = False
        self.before_answer: Callable[[], object] = lambda: None
        self.requests: list[str] = []
        self.heard = asyncio.Event()
        self._task = asyncio.ensure_future(self._serve())

    async def _serve(self) -> None:
        data = b""
        while received := await asyncio.get_running_loop().sock_recv(self._end, 65536):
            *lines, data = (data + received).split(b"\n")
            for line in lines:
                request = json.loads(line.lstrip(b"\xff"))
                self.requests.append(request["execute"])
                self.heard.set()
                if self.mute:
                    continue
                if request["execute"] == "guest-sync-delimited":
                    before, self.before = self.before, b""
                    await self.say(before + answer_to(request))
                else:
                    self.before_answer()
                    await self.say(self.answers.pop(0) if self.answers else PONG)

    async def say(self, data: bytes) -> None:
        """Write to the host."""
        await asyncio.get_running_loop().sock_sendall(self._end, data)

    async def until_heard(self) -> None:
        """Wait for the next request."""
        self.heard.clear()
        await self.heard.wait()

    async def close(self) -> None:
        """Close the port, as QEMU does when it ends."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._end.close()


def answer_to(request: dict[str, Any]) -> bytes:
    """Return the agent's answer to a synchronization."""
    return b'\xff{"return": %d}\n' % request["arguments"]["id"]


@pytest.fixture
async def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
async def agent(pauses: Pauses) -> AsyncIterator[GuestAgent]:
    agent = GuestAgent(pauses)
    yield agent
    await agent.close()


@pytest.fixture
async def guest(agent: GuestAgent) -> AsyncIterator[Guest]:
    guest = Guest(agent.open())
    yield guest
    await guest.close()


@pytest.fixture
async def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets seconds pass at once on the loop's clock."""
    loop, passed = asyncio.get_running_loop(), [0.0]
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + sum(passed))
    return passed.append


def opened(open: bool) -> PortChanged:
    return PortChanged("VSERPORT_CHANGE", time.time(), {"id": AGENT_PORT, "open": open})


async def test_the_channel_is_synchronized_once(agent: GuestAgent, guest: Guest) -> None:
    for _ in range(3):
        assert await agent.execute("guest-ping") == {}
    assert guest.requests == ["guest-sync-delimited", *3 * ["guest-ping"]]


async def test_calls_at_once_take_turns(agent: GuestAgent, guest: Guest) -> None:
    guest.answers = [b'{"return": %d}\n' % number for number in range(50)]
    calls = [agent.execute("guest-info") for _ in range(50)]
    assert await asyncio.gather(*calls) == list(range(50))


async def test_a_slow_agent_is_not_a_dead_agent(
    agent: GuestAgent, guest: Guest, jump: Callable[[float], None]
) -> None:
    await agent.execute("guest-ping")
    guest.before_answer = lambda: jump(0.9 * ANSWER)
    calls = [agent.execute("guest-info") for _ in range(50)]
    assert await asyncio.gather(*calls) == 50 * [{}]
    assert await agent.probe() is None  # it needed more than 5 s
    with pytest.raises(TimeoutError):  # the deadline of a caller counts all requests
        async with asyncio.timeout(4 * ANSWER):
            await asyncio.gather(*(agent.execute("guest-info") for _ in range(50)))


async def test_all_requests_hear_together_that_the_agent_is_dead(
    agent: GuestAgent, guest: Guest, jump: Callable[[float], None]
) -> None:
    guest.mute = True
    early = [asyncio.ensure_future(agent.execute("guest-exec")) for _ in range(50)]
    await guest.until_heard()
    jump(0.5 * ANSWER)
    late = asyncio.ensure_future(agent.execute("guest-exec"))
    await asyncio.sleep(0)
    jump(0.5 * ANSWER)
    await asyncio.wait(early, timeout=0.4 * ANSWER)
    assert {str(call.exception()) for call in early} == {
        "the guest agent did not answer guest-exec within 30 s"
    }
    assert not late.done()
    jump(0.5 * ANSWER)
    with pytest.raises(VMTimeoutError):
        await late


async def test_several_commands_take_one_round_trip(agent: GuestAgent, guest: Guest) -> None:
    guest.answers = [b'{"return": 1}\n', b'{"error": {"desc": "no"}}\n', b'{"return": 3}\n']
    requests: list[tuple[str, dict[str, Any]]] = [("guest-info", {"n": 1}), *2 * [("guest-x", {})]]
    first, second, third = await agent.execute_all(requests)
    assert [result_of("guest-x", reply) for reply in (first, third)] == [1, 3]
    with pytest.raises(GuestAgentError, match="refused guest-x: no"):
        result_of("guest-x", second)
    guest.mute = True
    cancelled = asyncio.ensure_future(agent.execute_all(requests))
    await guest.until_heard()
    cancelled.cancel()
    await asyncio.wait([cancelled])
    guest.mute = False
    await guest.say(b'{"return": "late"}\n')
    assert await agent.execute("guest-ping") == {}


async def test_a_late_reply_is_not_the_reply_to_the_next_request(
    agent: GuestAgent, guest: Guest
) -> None:
    await agent.execute("guest-ping")
    guest.mute = True
    cancelled = asyncio.ensure_future(agent.execute("guest-get-time"))
    await guest.until_heard()
    cancelled.cancel()
    await asyncio.wait([cancelled])
    with pytest.raises(VMTimeoutError, match="did not answer guest-info within"):
        await agent.execute("guest-info", timeout=NEVER)
    assert guest.requests[-2:] == ["guest-get-time", "guest-sync-delimited"]
    guest.mute = False
    await guest.say(b'{"return": "late"}\n\xff{"return": 1}\n')
    assert await agent.execute("guest-ping") == {}


async def test_a_synchronization_that_is_lost_is_sent_again(
    agent: GuestAgent, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolvm_async.qemu.guest_agent.AGAIN", 0.01)
    guest.mute = True
    call = asyncio.ensure_future(agent.execute("guest-ping"))
    while len(guest.requests) < 3:
        await guest.until_heard()
    assert set(guest.requests) == {"guest-sync-delimited"}  # no command before an answer
    guest.mute = False
    assert await call == {}


async def test_a_request_ends_with_its_agent(agent: GuestAgent, guest: Guest) -> None:
    await agent.execute("guest-ping")
    guest.mute = True
    call = asyncio.ensure_future(agent.execute("guest-exec"))
    await guest.until_heard()
    agent.on_event(opened(False))
    with pytest.raises(ConnectionLostError, match="the guest agent ended during guest-exec"):
        await call
    guest.mute = False
    assert await agent.execute("guest-ping") == {}


async def test_a_request_waits_for_an_agent_that_starts_again(
    agent: GuestAgent, guest: Guest
) -> None:
    await agent.execute("guest-ping")
    agent.on_event(opened(False))
    agent.on_event(opened(True))
    assert await agent.execute("guest-ping") == {}
    assert guest.requests[-2:] == ["guest-sync-delimited", "guest-ping"]


async def test_a_pause_does_not_count(agent: GuestAgent, guest: Guest, pauses: Pauses) -> None:
    pauses.set(active=True, fault=False, held=False)
    guest.mute = True
    call = asyncio.ensure_future(agent.execute("guest-ping", timeout=NEVER))
    await asyncio.sleep(2 * NEVER)
    assert not call.done()
    pauses.set(active=False, fault=False, held=False)
    with pytest.raises(VMTimeoutError):
        await call


async def test_calls_end_with_qemu(agent: GuestAgent, guest: Guest) -> None:
    guest.mute = True
    calls = [asyncio.ensure_future(agent.execute("guest-ping")) for _ in range(2)]
    await guest.until_heard()
    await guest.close()
    for call in (*calls, agent.execute("guest-ping")):
        with pytest.raises(VMNotRunningError, match="QEMU has ended"):
            await call


async def test_calls_end_with_the_channel(agent: GuestAgent, guest: Guest) -> None:
    guest.mute = True
    calls = [asyncio.ensure_future(agent.execute("guest-ping")) for _ in range(2)]
    await guest.until_heard()
    await agent.close()
    for call in calls:
        with pytest.raises(VMNotRunningError):
            await call


async def test_a_refusal_is_told_without_control_characters(
    agent: GuestAgent, guest: Guest
) -> None:
    guest.answers = [b'{"error": {"class": "CommandNotFound", "desc": "\\u001b[2Jno"}}\n']
    with pytest.raises(GuestAgentError, match=r"refused guest-exec: no$") as caught:
        await agent.execute("guest-exec")
    assert (caught.value.command, caught.value.error_class) == ("guest-exec", "CommandNotFound")
    await agent.execute("guest-ping")
    assert guest.requests.count("guest-sync-delimited") == 1  # a refusal is a proper reply


@pytest.mark.parametrize(
    "answer",
    [
        *(b"", b"{}", b"[]", b"1", b"null", b'{"return": ', b"\x1b[2J", b"\xff\xfe{", b"[" * LIMIT),
        *(b'{"return": 9%s}' % (b"9" * 5000), b'{"event": "RESET"}', b"\0" * 10, b'"return"'),
    ],
)
async def test_what_is_not_a_reply_is_an_error_of_one_call(
    agent: GuestAgent, guest: Guest, answer: bytes
) -> None:
    guest.answers = [answer + b"\n"]
    with pytest.raises(GuestAgentError, match=r"is not a reply|more than") as caught:
        await agent.execute("guest-info")
    assert len(str(caught.value)) < 1000
    assert re.search(r"[\x00-\x1f]", str(caught.value)) is None
    assert await agent.execute("guest-ping") == {}


@pytest.mark.parametrize("error", [b"1", b"null", b"[]", b"{}", b'{"desc": [], "class": 1}'])
async def test_an_error_of_any_form_is_a_refusal(
    agent: GuestAgent, guest: Guest, error: bytes
) -> None:
    guest.answers = [b'{"error": %s}\n' % error]
    with pytest.raises(GuestAgentError, match="refused guest-info"):
        await agent.execute("guest-info")


async def test_an_unasked_reply_is_no_reply_to_the_next_request(
    agent: GuestAgent, guest: Guest
) -> None:
    guest.answers = [b'{"return": 1}\n{"return": 2}\n{"ret', PONG]
    assert await agent.execute("guest-info") == 1
    assert await agent.execute("guest-ping") == {}


FLOODS: dict[str, Callable[[int], bytes]] = {
    "one line": lambda size: b"x" * size,
    "lines": lambda size: b'{"return": 1}\n' * (size // 14),
    "answers to other numbers": lambda size: b'\xff{"return": 1}\n' * (size // 15),
    "delimiters": lambda size: b"\xff" * size,
    "newlines": lambda size: b"\n" * size,
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_ends_the_call_and_waits_in_the_guest(
    agent: GuestAgent, guest: Guest, flood: str
) -> None:
    data = FLOODS[flood](65536)
    written = 0

    async def write() -> None:
        nonlocal written
        while True:
            await guest.say(data)
            written += len(data)

    guest.mute = True
    writing = asyncio.ensure_future(write())
    try:
        with pytest.raises(GuestAgentError, match="writes without end before guest-ping"):
            await agent.execute("guest-ping", timeout=SOON)
        await asyncio.sleep(NEVER)  # the call is over: the guest has to wait
        assert written < 2 * STALE
    finally:
        writing.cancel()
        await asyncio.wait([writing])


@pytest.mark.parametrize("size", [LIMIT, 1 << 22])
async def test_an_endless_line_is_not_read_to_its_end(
    agent: GuestAgent, guest: Guest, size: int
) -> None:
    guest.answers = [b'{"return": "' + b"x" * size]
    with pytest.raises(GuestAgentError, match=f"guest-info has more than {LIMIT} bytes"):
        await agent.execute("guest-info")


async def test_a_full_port_does_not_hold_a_call_for_ever(agent: GuestAgent) -> None:
    with agent.open():  # nobody reads it
        with pytest.raises(VMTimeoutError):
            await agent.execute("guest-ping", {"x": "x" * (1 << 22)}, timeout=NEVER)
        await agent.close()


@pytest.mark.parametrize(
    "item", [b"[],", b"{},", b'{"a":1},', b'"",', b"1,", b"1e5,", b"[[]],", b'"\\u0001",']
)
async def test_the_worst_reply_blocks_the_loop_shortly(
    agent: GuestAgent, guest: Guest, item: bytes
) -> None:
    items = item * ((LIMIT - 20) // len(item))
    reply = b'{"return": [%s]}\n' % items[:-1]
    await agent.execute("guest-ping")
    shortest = 1.0
    for _ in range(5):  # the host may be busy
        guest.answers = [reply]
        longest, task = 0.0, asyncio.ensure_future(agent.execute("guest-info"))
        while not task.done():
            before = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - before)
        await task
        shortest = min(shortest, longest)
    assert shortest < 0.02  # seconds of processor time


async def test_a_new_channel_starts_afresh(pauses: Pauses) -> None:
    """A restored guest writes the rest of a reply that its snapshot was taken in."""
    clone = GuestAgent(pauses)
    guest = Guest(clone.open())
    guest.before = b'rn": {}}\n'
    assert await clone.execute("guest-ping") == {}
    await guest.close()
    await clone.close()


async def test_a_closed_channel_answers_at_once(agent: GuestAgent, guest: Guest) -> None:
    await agent.close()
    with contextlib.suppress(VMNotRunningError):
        await agent.execute("guest-ping")
        pytest.fail("it answered")


async def test_an_agent_is_there_once_it_opens_its_port_and_until_a_reset(
    agent: GuestAgent, guest: Guest
) -> None:
    assert not await agent.present()
    agent.on_event(opened(True))
    assert await agent.present()
    agent.on_event(opened(False))
    assert not await agent.present()  # some firmware opens each port, too
    await agent.execute("guest-ping")
    assert await agent.present()  # it may be starting again
    agent.on_event(Reset("RESET", time.time(), {}))
    assert not await agent.present()
