"""QEMU's monitor: a QMP session. Only this module imports `qemu.qmp`, QEMU's client.

The client works well while a session is up. Eight facts about the client explain this code:

1. The client accepts a connected socket. So the session uses a socketpair, and QEMU inherits one
   end. A socket file could have too long a path or stay behind, and we would have to wait for it.
   This process closes its copy of QEMU's end at once; otherwise it never sees QEMU's end of file.
2. An anyio cancel scope around `connect()` leaves the client in the state DISCONNECTING and leaks a
   future. The client's own tasks are outside every scope. So `connect()` and `disconnect()` run in
   separate tasks, and we always wait for these tasks. We end a `connect()` by a socket shutdown.
3. After the end of file, `execute()` and `disconnect()` raise, even after a successful `quit`. If
   nobody calls `disconnect()`, asyncio logs an exception that was never retrieved. So we always
   call `disconnect()` and ignore its errors.
4. `EventListener.get()` hangs forever after the end of file. So we do not use it.
5. `client.events` keeps every event: 50,000 events take 60 MB. So our event filter passes each
   event on and tells the client not to keep the event.
6. A reply of more than 10 MiB ends the session. No command here has such a large reply.
7. Cancelling `execute()` does not cancel the command in QEMU. The client ignores the late reply.
   Work that must not overlap with such a command runs in a `CommandQueue`.
8. The client formats every message for its log, even if the log is off: 0.15 s for 1.4 MB.
   `_Client` formats messages only if the log is on.
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
from smolvm_async.foundation.fork import private
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import settle, take_exception
from smolvm_async.qemu.events import Event, Ports, parse_event

# This module raises or expects all errors that the client logs. DEBUG shows every message.
wire = get_logger(f"{__name__}.wire")
wire.setLevel(logging.CRITICAL)

ANSWER = 30.0  # seconds that a caller waits for QEMU's answer; usually, QEMU answers in 0.3 ms
LAST_WORDS = 1.0  # seconds to read the last events after QEMU has ended

T = TypeVar("T")


class _Client(QMPClient):
    """A QMP client that formats messages for its log only if the log is on."""

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if wire.isEnabledFor(logging.DEBUG) else msg

    def _cb_inbound(self, msg: Message) -> Message:
        return super()._cb_inbound(msg) if wire.isEnabledFor(logging.DEBUG) else msg


class Monitor:
    """A QMP session over a socketpair. QEMU has inherited one end of it.

    Attributes:
        explain: Adds the VM's troubles to the error of a deadline; see `Troubles.explain()`.
    """

    def __init__(
        self,
        on_event: Callable[[Event], None],
        explain: Callable[[Any], Any] = lambda error: error,
    ) -> None:
        self.explain = explain
        self._client = _Client()  # unnamed: for each name, Python makes a logger and never frees it
        self._client.logger = wire

        ports = Ports()

        def hand_on(message: Any) -> bool:
            for event in ports.complete(parse_event(message)):
                on_event(event)
            return False  # the client does not keep the event

        self._client.events.event_filter = hand_on
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def open(self) -> socket.socket:
        """Make the socketpair and return QEMU's end. The caller closes it once QEMU has it."""
        self._socket, qemus = socket.socketpair()
        private(self._socket.fileno())
        return qemus

    async def connect(self, ends: Iterable[asyncio.Future[Any]], timeout: float) -> None:
        """Wait for QEMU's greeting and its answer to the first command.

        Raises:
            LaunchError: If QEMU does not answer in time, or a future in `ends` is done first.
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
                    self._socket.shutdown(socket.SHUT_RDWR)  # the end of file ends connect()
            with contextlib.suppress(QMPError, AssertionError):  # QEMU has just died
                await settle(connecting)
        if self._client.runstate is not Runstate.RUNNING:
            raise LaunchError(f"QEMU's monitor did not answer within {timeout:g} s")

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command and return its result.

        Raises:
            MonitorError: If QEMU refuses the command, or does not answer within 30 s.
            VMNotRunningError: If QEMU has ended.
        """
        try:
            async with asyncio.timeout(ANSWER):
                return await self.complete(command, arguments)
        except TimeoutError:
            message = f"QEMU did not answer {command} within {ANSWER:g} s"
            raise self.explain(MonitorError(message, command=command)) from None

    async def complete(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command without a deadline. See `execute()`."""
        try:
            return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            message = f"QEMU refused {command}: {error}"
            raise MonitorError(message, command=command, error_class=error.error_class) from error
        except QMPError as error:
            raise VMNotRunningError(f"QEMU has ended; {command} was not executed") from error

    async def send_descriptor(self, name: str, fd: int) -> None:
        """Give QEMU a copy of an open descriptor, under a name that `fd:NAME` then uses."""
        self._client.send_fd_scm(fd)
        await self.execute("getfd", {"fdname": name})

    async def read_port(self, line: str) -> int:
        """Read an I/O port with `line`, a human monitor command: QMP cannot read I/O ports."""
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
        """Pass on the last events of QEMU after QEMU has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                while self._client.runstate is Runstate.RUNNING:
                    await self._client.runstate_changed()

    async def disconnect(self) -> None:
        """End the session, ignore its errors, and wait for its background tasks."""
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
    """A queue for sequences of commands: each sequence runs to its end before the next one starts.

    A caller that is cancelled or times out returns at once. Its sequence continues in the
    background and keeps its turn: QEMU already has the current command, and would otherwise
    execute it during the next sequence.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._turn = asyncio.Lock()

    async def take(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `work`, which must use `Monitor.complete()`. Raise the same errors as `execute()`."""
        try:
            async with asyncio.timeout(ANSWER):
                await self._turn.acquire()
                task = self._monitor.start_task(work())
                task.add_done_callback(lambda _: self._turn.release())
                await asyncio.wait([task])
        except TimeoutError:
            message = f"QEMU did not answer within {ANSWER:g} s"
            raise self._monitor.explain(MonitorError(message)) from None
        return task.result()
