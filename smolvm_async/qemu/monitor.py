"""QEMU's monitor: a QMP session. No other module imports `qemu.qmp`, QEMU's client.

The client works well while a session is up. Eight facts about it explain the code below:

1. It accepts a connected socket. So the session runs over a socketpair whose other end QEMU
   inherits: no socket file has to be waited for, has a path that is too long, or is left behind.
   This process has to close its copy of QEMU's end at once, or the end of QEMU never shows.
2. An anyio cancel scope around `connect()` wedges the client: it stays in DISCONNECTING and leaks a
   future. The client's own tasks are outside every scope. So `connect()` and `disconnect()` run in
   tasks of their own, which are always waited for; shutting the socket down ends a connect.
3. After the end of file `execute()` raises, and so does `disconnect()`, even after a successful
   `quit`. If nobody calls `disconnect()`, asyncio logs an exception that was never retrieved. So it
   is always called, and its errors are ignored.
4. `EventListener.get()` hangs forever after the end of file. It is not used.
5. `client.events` keeps every event: 50,000 take 60 MB. So its filter passes each event on, and
   keeps none.
6. A reply of more than 10 MiB ends the session. No command here has such a reply.
7. Cancelling `execute()` does not cancel the command in QEMU. Its late reply is ignored. Work that
   must not overlap with such a command goes through a `CommandQueue`.
8. The client formats every message for its log, even if the log is off: 0.15 s for 1.4 MB.
   `_Client` does so only if somebody reads the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, Message, QMPClient, QMPError, Runstate

from smolvm_async.errors import LaunchError, MonitorError, VMNotRunningError
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import settle, take_exception
from smolvm_async.qemu.events import Event, parse_event

# The client logs errors that are raised here, or expected. DEBUG shows every message.
wire = get_logger(f"{__name__}.wire")
wire.setLevel(logging.CRITICAL)

ANSWER = 30.0  # seconds that a caller waits for QEMU's answer; it usually takes 0.3 ms
LAST_WORDS = 1.0  # seconds to read the last events of a QEMU that has ended

T = TypeVar("T")


class _Client(QMPClient):
    """The client, which formats messages for its log only if somebody reads the log."""

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if wire.isEnabledFor(logging.DEBUG) else msg

    def _cb_inbound(self, msg: Message) -> Message:
        return super()._cb_inbound(msg) if wire.isEnabledFor(logging.DEBUG) else msg


class Monitor:
    """A QMP session over a socketpair whose other end QEMU has inherited."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._client = _Client()  # a name would cost a logger that is never freed
        self._client.logger = wire

        def hand_on(message: Any) -> bool:
            on_event(parse_event(message))
            return False  # the client does not keep the event

        self._client.events.event_filter = hand_on
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def open(self) -> socket.socket:
        """Make the socketpair and return QEMU's end, which the caller closes once QEMU has it."""
        self._socket, qemus = socket.socketpair()
        return qemus

    async def connect(self, ends: Iterable[asyncio.Future[Any]], timeout: float) -> None:
        """Wait for QEMU's greeting and its answer to the first command.

        Raises:
            LaunchError: If there is no answer in time, or one of the futures `ends` is done before.
        """
        assert self._socket is not None
        connecting = asyncio.ensure_future(self._client.connect(self._socket))
        try:
            await asyncio.wait(
                {connecting, *ends}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            if not connecting.done():
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)  # the end of file ends the attempt
            with contextlib.suppress(QMPError, AssertionError):  # QEMU has just died
                await settle(connecting)
        if self._client.runstate is not Runstate.RUNNING:
            raise LaunchError(f"QEMU's monitor gave no answer within {timeout:g} s")

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command and return its result.

        Raises:
            MonitorError: If QEMU refuses it, or does not answer within 30 s.
            VMNotRunningError: If QEMU has ended.
        """
        try:
            async with asyncio.timeout(ANSWER):
                return await self.complete(command, arguments)
        except TimeoutError:
            message = f"QEMU did not answer {command} within {ANSWER:g} s"
            raise MonitorError(message, command=command) from None

    async def complete(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command without a deadline. See `execute()`."""
        try:
            return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            message = f"QEMU refused {command}: {error}"
            raise MonitorError(message, command=command, error_class=error.error_class) from error
        except QMPError as error:
            raise VMNotRunningError(f"QEMU has ended; {command} was not executed") from error

    async def read_port(self, line: str) -> int:
        """Read an I/O port by a line of the human monitor: QMP itself has no command for this."""
        answer = await self.execute("human-monitor-command", {"command-line": line})
        try:
            return int(answer.split("=")[1], 16)
        except (IndexError, ValueError):
            message = f"QEMU did not understand {line!r}: {answer!r}"
            raise MonitorError(message, command="human-monitor-command") from None

    def start_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a background task that lasts at most as long as the QMP session."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # asyncio has only weak references to tasks
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        take_exception(task)

    async def last_words(self) -> None:
        """Once QEMU has ended, pass on the events that it still sent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                while self._client.runstate is Runstate.RUNNING:
                    await self._client.runstate_changed()

    async def disconnect(self) -> None:
        """End the session, whose errors are ignored, and wait for its background tasks."""
        if self._socket is not None:
            await settle(self._disconnect(self._socket))

    async def _disconnect(self, ours: socket.socket) -> None:
        try:
            if self._client.runstate is not Runstate.IDLE:
                with contextlib.suppress(QMPError, EOFError, OSError):
                    await self._client.disconnect()
            if self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            ours.close()
            self._socket = None


class CommandQueue:
    """Runs pieces of work of several commands each, one after another, each to its end.

    A caller that is cancelled, or has waited long enough, leaves at once. Its work goes on in the
    background and keeps its turn: QEMU already has the command, and would execute it while the
    next piece of work starts.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._turn = asyncio.Lock()

    async def take(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run some work, which has to use `Monitor.complete()`. It raises as `execute()` does."""
        try:
            async with asyncio.timeout(ANSWER):
                await self._turn.acquire()
                task = self._monitor.start_task(work())
                task.add_done_callback(lambda _: self._turn.release())
                await asyncio.wait([task])
        except TimeoutError:
            raise MonitorError(f"QEMU did not answer within {ANSWER:g} s") from None
        return task.result()
