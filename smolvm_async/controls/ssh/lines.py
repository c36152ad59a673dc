"""The lines that a command prints, as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from smolvm_async.config.checks import shown
from smolvm_async.controls.ssh.execution import Execution, Stream
from smolvm_async.controls.ssh.result import Line
from smolvm_async.errors import CommandTimeoutError

MAX_LINE = 1 << 20  # bytes; a longer one comes in pieces
BEHIND = 1 << 20  # bytes that may wait here before the guest is told to wait


class LineStream:
    """An async iterator of `Line`; it ends when the command does.

    Attributes:
        exit_code: As of `subprocess`; `None` until the lines have ended.
    """

    def __init__(self, command: str, lost: Callable[[], Exception]) -> None:
        self._command = command
        self._timeout: float | None = None
        self._deadline: float | None = None
        self._lost = lost
        self._execution: Execution | None = None
        self._lines: deque[tuple[Line, int]] = deque()  # each with its bytes
        self._waiting = 0  # bytes in them
        self._paused = False
        self._partial: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._news = asyncio.Event()

    @property
    def exit_code(self) -> int | None:
        """See the class."""
        return self._execution.exit_code if self._execution else None

    def follow(self, execution: Execution, timeout: float | None, deadline: float | None) -> None:
        """The command has been started, and has `timeout` seconds until `deadline` (loop time)."""
        self._execution, self._timeout, self._deadline = execution, timeout, deadline
        execution.ended.add_done_callback(lambda _: self._end())
        self._throttle()

    def receive(self, stream: Stream, data: bytes) -> None:
        """It has printed something."""
        partial = self._partial[stream]
        partial += data
        *whole, rest = partial.split(b"\n")
        while len(rest) >= MAX_LINE:
            whole.append(rest[:MAX_LINE])
            rest = rest[MAX_LINE:]
        self._partial[stream] = rest
        for line in whole:
            self._add(stream, line)
        if whole:
            self._news.set()
        self._throttle()

    def _add(self, stream: Stream, line: bytes | bytearray) -> None:
        self._lines.append((Line(line.decode(errors="replace"), stream), len(line) + 1))
        self._waiting += len(line) + 1

    def timed_out(self, timeout: float | None) -> CommandTimeoutError:
        """What to raise if it has not ended in time."""
        return CommandTimeoutError(
            f"{shown(self._command)} did not end within {timeout:g} s, and is killed."
        )

    def _end(self) -> None:
        for stream, rest in self._partial.items():
            if rest:
                self._add(stream, rest)
        self._partial = {"stdout": bytearray(), "stderr": bytearray()}
        self._news.set()

    def _throttle(self) -> None:
        if self._execution is None or self._execution.ended.done():
            return
        if not self._paused and self._waiting > BEHIND:
            self._paused = True
            self._execution.channel.pause_reading()
        elif self._paused and self._waiting <= BEHIND // 2:
            self._paused = False
            self._execution.channel.resume_reading()

    def __aiter__(self) -> LineStream:
        return self

    async def __anext__(self) -> Line:
        assert self._execution is not None
        while not self._lines:
            if self._execution.ended.done():
                if self._execution.exit_code is None:
                    raise self._lost()
                raise StopAsyncIteration
            self._news.clear()
            try:
                async with asyncio.timeout_at(self._deadline):
                    await self._news.wait()
            except TimeoutError:
                raise self.timed_out(self._timeout) from None
        line, size = self._lines.popleft()
        self._waiting -= size
        self._throttle()
        return line
