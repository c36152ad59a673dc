"""QEMU's monitor: the only importer of `qemu.qmp`.

The client's own tasks live outside every anyio scope, and a scope that cancels its `connect()`
wedges it: `connect()` and `disconnect()` run in tasks of their own, which are waited for.
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

# What the client logs as errors is raised here, or expected. DEBUG shows every message.
wire = get_logger(f"{__name__}.wire")
wire.setLevel(logging.CRITICAL)

ANSWER = 30.0  # seconds that a caller waits for QEMU's answer, which usually takes 0.3 ms
LAST_WORDS = 1.0  # seconds to read what a QEMU that has ended still had to say

T = TypeVar("T")


class _Client(QMPClient):
    """The client renders each message for its log; here, only if somebody reads that."""

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
            return False  # or the client would keep every event for ever

        self._client.events.event_filter = hand_on
        self._socket: socket.socket | None = None
        self._begun: set[asyncio.Task[Any]] = set()

    def open(self) -> socket.socket:
        """Make the socketpair; returns QEMU's end, which the caller closes once QEMU has it."""
        self._socket, qemus = socket.socketpair()
        return qemus

    async def connect(self, ends: Iterable[asyncio.Future[Any]], timeout: float) -> None:
        """Wait for the greeting and negotiate.

        Args:
            ends: Futures that mean the end of the attempt, such as a process's exit.
            timeout: Seconds.

        Raises:
            LaunchError: If the session does not come about.
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
            with contextlib.suppress(QMPError, AssertionError):  # QEMU died as it had just begun
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
        """Execute a QMP command, however long QEMU takes. See `execute()`."""
        try:
            return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            message = f"QEMU refused {command}: {error}"
            raise MonitorError(message, command=command, error_class=error.error_class) from error
        except QMPError as error:
            raise VMNotRunningError(f"QEMU has ended; {command} was not executed") from error

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin what goes on though nobody waits for it, until QEMU ends."""
        task = asyncio.ensure_future(work)
        self._begun.add(task)  # asyncio itself refers to its tasks weakly
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._begun.discard(task)
        take_exception(task)

    async def last_words(self) -> None:
        """Once QEMU has ended: hand on the events that it still sent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                while self._client.runstate is Runstate.RUNNING:
                    await self._client.runstate_changed()

    async def disconnect(self) -> None:
        """End the session, and all that was begun in it.

        Nothing is raised, since an ended QEMU is what one expects here.
        """
        if self._socket is not None:
            await settle(self._disconnect(self._socket))

    async def _disconnect(self, ours: socket.socket) -> None:
        try:
            if self._client.runstate is not Runstate.IDLE:
                with contextlib.suppress(QMPError, EOFError, OSError):
                    await self._client.disconnect()
            if self._begun:
                await asyncio.wait(self._begun)
        finally:
            ours.close()
            self._socket = None


class CommandQueue:
    """Pieces of work of several commands each: one after another, and each to its end.

    A caller that is cancelled, or has waited long enough, leaves at once. What it has begun goes on
    and keeps the turn: QEMU, which has its command, would do it while the next one began.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._turn = asyncio.Lock()

    async def take(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do some work, which uses `Monitor.complete()`.

        Raises:
            MonitorError, VMNotRunningError: See `Monitor.execute()`.
        """
        try:
            async with asyncio.timeout(ANSWER):
                await self._turn.acquire()
                task = self._monitor.begin(work())
                task.add_done_callback(lambda _: self._turn.release())
                await asyncio.wait([task])
        except TimeoutError:
            raise MonitorError(f"QEMU did not answer within {ANSWER:g} s") from None
        return task.result()
