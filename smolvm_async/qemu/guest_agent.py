"""The host's end of the QEMU guest agent's port: requests to the agent, one reply for each.

The agent speaks JSON lines, which `docs/interop/qemu-ga-ref` of QEMU describes. It answers one
request after the other, and its replies do not name their request. `qemu.qmp`, QEMU's client of its
monitor, does not fit: it expects a greeting, ends its session at a reply without an id and at the
byte 0xFF, and reads as fast as the guest writes.

- Before the first request, and after each request without a proper reply, the channel is out of
  step: a late reply may still arrive. `guest-sync-delimited` brings it into step. The byte 0xFF in
  front of it makes the agent drop an unfinished request. The agent's answer has the same byte in
  front and the number that was sent, so all that comes before is skipped.
- QEMU keeps a request until an agent opens the port. A synchronization can get lost with an agent
  that ends, so it is sent again, with another number: only the last one's answer counts. A command
  is only sent after this answer, so no later agent executes a command that was given up.
- The guest may be hostile. Nothing is read while no call waits, so the guest must wait, too. A
  longer line than `LIMIT` is not parsed: `LIMIT` bytes of the worst JSON take 4 ms.

No Windows was run: its agent speaks the same protocol, as QEMU's source says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smolvm_async.errors import (
    ConnectionLostError,
    GuestAgentError,
    SmolVMError,
    UnsupportedError,
    VMNotRunningError,
    VMTimeoutError,
)
from smolvm_async.foundation.fork import private
from smolvm_async.foundation.rpc import rpc
from smolvm_async.foundation.tail import printable
from smolvm_async.qemu.arguments import AGENT_PORT
from smolvm_async.qemu.events import Event, PortChanged, Reset
from smolvm_async.qemu.pauses import GuestTimeout, Pauses

PROBE = 5.0  # seconds for the answer to a ping, while the guest may not run an agent yet
ANSWER = 30.0  # seconds until an agent that does not answer is dead; usually, it needs 0.4 ms
AGAIN = 2.0  # seconds until the synchronization is sent again; each time twice as long
CHUNK = 65536  # bytes to read at once
LIMIT = 1 << 17  # bytes of a reply
STALE = 1 << 20  # bytes that a call skips before its reply; more is a flood
OVERLAP = 64  # bytes that an answer to a synchronization has at most
QUOTED = 200  # characters of the guest's in an error message
Result = dict[str, Any] | list[Any] | str | int | float | bool | None  # any JSON value
DELIMITER = b"\xff"  # is in no UTF-8 text, so in no request and no reply


class GuestAgent:
    """A channel to the guest agent over a socketpair. QEMU has inherited one end of it."""

    def __init__(self, pauses: Pauses, explain: Callable[[Any], Any] = lambda error: error) -> None:
        self._pauses = pauses
        self._explain = explain
        self._socket: socket.socket | None = None
        self._turn = asyncio.Lock()
        self._in_step = False
        self._received = bytearray()  # bytes that no call has used
        self._waiting: GuestTimeout | None = None  # the deadline of a request that was sent
        self._open = False  # whether a program of the guest has opened the agent's port
        self._answered = False  # whether an agent has answered since the guest's last reset
        self._left = False  # whether the agent closed its port during that request
        self._heard = 0.0  # the time of the agent's last answer, of `Pauses.time()`
        self.used = 0.0  # the time of the last request, of `time.monotonic()`

    def open(self) -> socket.socket:
        """Make the socketpair and return QEMU's end. The caller closes it once QEMU has it."""
        self._socket, qemus = socket.socketpair()
        self._socket.setblocking(False)
        private(self._socket.fileno())
        return qemus

    async def close(self) -> None:
        """Close the channel. Calls that still wait raise `VMNotRunningError`."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # the end of file ends the waiting calls
            async with self._turn:
                self._socket.close()

    def on_event(self, event: Event) -> None:
        """End the current request if its agent has ended. Call this with every event of QEMU."""
        if isinstance(event, Reset):
            self._answered = False
        if not isinstance(event, PortChanged) or event.port != AGENT_PORT:
            return
        self._open = event.open
        if not event.open:
            self._in_step = False
            if self._waiting is not None:
                self._left = True
                self._waiting.restart(0.0)

    @rpc
    async def present(self) -> bool:
        """Return whether the guest has an agent, which may be starting again at the moment."""
        return self._open or self._answered

    async def probe(self) -> str | None:
        """Return the evidence that an agent answers; `None` if none answers within 5 s."""
        try:
            async with self._pauses.timeout(PROBE):  # earlier requests count here
                await self.execute("guest-ping")
        except (SmolVMError, TimeoutError):
            return None
        return "the guest agent answered a ping"

    @rpc
    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = ANSWER,
    ) -> Result:
        """Execute a command of the agent and return its result: the guest may send anything.

        A cancelled call returns at once, but the agent may still execute its command.

        Args:
            command: The command's name, such as `guest-ping`.
            arguments: The command's arguments.
            timeout: Seconds without an answer of the agent, and without the time of a pause. They
                begin again with each answer to an earlier request, and end in the request's turn.

        Raises:
            GuestAgentError: The agent refused the command, or its reply is not one.
            ConnectionLostError: The agent ended, so the command may have been executed.
            VMTimeoutError: The agent did not answer in time; there may be no agent.
            VMNotRunningError: QEMU has ended.
            UnsupportedError: The library does not speak to an agent in this guest.
        """
        (reply,) = await self.execute_all([(command, dict(arguments or {}))], timeout=timeout)
        return result_of(command, reply)

    @rpc
    async def execute_all(
        self, requests: Sequence[tuple[str, dict[str, Any]]], *, timeout: float = ANSWER
    ) -> list[dict[str, Any]]:
        """Execute commands one after the other, in one round trip, and return the agent's replies.

        A command is executed even if an earlier one is refused. `result_of()` reads a reply.

        Args:
            requests: At most eight commands with their arguments.
            timeout: Seconds for all answers; see `execute()`.

        Raises:
            GuestAgentError: A reply is not one.
            ConnectionLostError, VMTimeoutError, VMNotRunningError, UnsupportedError: See
                `execute()`. The commands may have been executed.
        """
        if self._socket is None:
            raise UnsupportedError("the built-in image has no QEMU guest agent: use SSH.")
        self.used, asked = time.monotonic(), self._pauses.time()
        command = requests[0][0]
        async with self._turn:
            # All requests that wait for a dead agent fail together, and none while it answers.
            silent = self._pauses.time() - max(asked, self._heard)
            try:
                async with self._pauses.timeout(timeout - silent) as bound:
                    replies = await self._exchange(requests, bound)
            except TimeoutError:
                if self._left:
                    message = f"the guest agent ended during {command}"
                    raise ConnectionLostError(message) from None
                message = f"the guest agent did not answer {command} within {timeout:g} s"
                raise self._explain(VMTimeoutError(message, seconds=timeout)) from None
            self._heard = self._pauses.time()
        self._answered = self._answered or any("error" not in reply for reply in replies)
        return replies

    async def _exchange(
        self, requests: Sequence[tuple[str, dict[str, Any]]], bound: GuestTimeout
    ) -> list[dict[str, Any]]:
        """Send requests and return the replies, in this request's turn."""
        command = requests[0][0]
        self._left = False
        if not self._in_step or self._received:
            await self._synchronize(command)
        self._in_step, self._waiting = False, bound
        try:
            await self._send(b"".join(_request(*request) for request in requests), command)
            replies = [_parse(name, await self._line(name)) for name, _ in requests]
            self._in_step = True
        finally:
            self._waiting = None
        return replies

    async def _synchronize(self, command: str) -> None:
        """Bring the channel into step: send a number, and skip all bytes until its answer."""
        seconds, skipped = AGAIN, 0
        while True:
            number = secrets.randbits(31)
            answer = re.compile(rb'\xff{"return": ?%d}\r?\n' % number)
            request = _request("guest-sync-delimited", {"id": number})
            await self._send(DELIMITER + request, command)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while (found := answer.search(self._received)) is None:
                        skipped += len(self._received)
                        if skipped > STALE:
                            raise GuestAgentError(
                                f"the guest agent writes without end before {command}",
                                command=command,
                            )
                        del self._received[:-OVERLAP]
                        skipped -= len(self._received)
                        self._received += await self._receive(command)
                    del self._received[: found.end()]
                    return
            seconds *= 2

    async def _line(self, command: str) -> bytes:
        """Return the next line."""
        while (end := self._received.find(b"\n")) < 0 and len(self._received) <= LIMIT:
            self._received += await self._receive(command)
        if not 0 <= end <= LIMIT:
            message = f"the guest agent's reply to {command} has more than {LIMIT} bytes"
            raise GuestAgentError(message, command=command)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    async def _receive(self, command: str) -> bytes:
        assert self._socket is not None
        data = b""
        with contextlib.suppress(OSError):
            data = await asyncio.get_running_loop().sock_recv(self._socket, CHUNK)
        if not data:
            raise _ended(command)
        return data

    async def _send(self, request: bytes, command: str) -> None:
        assert self._socket is not None
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, request)
        except OSError:
            raise _ended(command) from None


def result_of(command: str, reply: Mapping[str, Any]) -> Result:
    """Return the result in the agent's reply to a command.

    Raises:
        GuestAgentError: The agent refused the command.
    """
    if "error" in reply:
        raise _refused(command, reply["error"])
    result: Result = reply["return"]
    return result


def _request(command: str, arguments: Mapping[str, object]) -> bytes:
    request = {"execute": command, **({"arguments": arguments} if arguments else {})}
    return json.dumps(request).encode() + b"\n"


def _parse(command: str, line: bytes) -> dict[str, Any]:
    """Return a reply, which has either `return` or `error`."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict) or not reply.keys() & {"return", "error"}:
        start = printable(line[:QUOTED].decode(errors="replace"))
        message = f"the guest agent's reply to {command} is not a reply: {start}"
        raise GuestAgentError(message, command=command)
    return reply


def _refused(command: str, error: Any) -> GuestAgentError:
    words = error if isinstance(error, dict) else {}
    reason, kind = (printable(str(words.get(key, "")))[:QUOTED] for key in ("desc", "class"))
    message = f"the guest agent refused {command}: {reason or 'it gave no reason'}"
    return GuestAgentError(message, command=command, error_class=kind)


def _ended(command: str) -> VMNotRunningError:
    return VMNotRunningError(f"QEMU has ended; the guest agent did not answer {command}")
