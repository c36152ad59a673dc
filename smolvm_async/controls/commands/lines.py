"""The lines of a running command's output."""

from __future__ import annotations

import asyncio
from collections import deque

from smolvm_async.config.checks import shown
from smolvm_async.controls.commands.result import Line
from smolvm_async.controls.commands.transport import Execution, Stream, Transport
from smolvm_async.errors import CommandTimeoutError
from smolvm_async.foundation.fork import this_process
from smolvm_async.qemu.pauses import GuestTimeout

MAX_LINE = 1 << 20  # bytes; a longer line comes in pieces
BEHIND = 1 << 20  # unread bytes to keep here before the guest must wait


class LineStream:
    """An async iterator of `Line`s, which ends when the command ends.

    Attributes:
        exit_code: The exit code as in `subprocess`; `None` until the lines have ended.
    """

    def __init__(self, command: str, timeout: float | None, transport: Transport) -> None:
        self._process = this_process()
        self._command = command
        self._timeout = timeout
        self._deadline: float | None = None
        self._transport = transport
        self._execution: Execution | None = None
        self._lines: deque[tuple[Line, int]] = deque()  # lines with their size in bytes
        self._waiting = 0  # bytes in `_lines`
        self._paused = False
        self._partial: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._news = asyncio.Event()

    @property
    def exit_code(self) -> int | None:
        """See the class."""
        return self._execution.exit_code if self._execution else None

    def follow(self, execution: Execution, deadline: float | None) -> None:
        """Note that the command has started and must end by `deadline`, in the guest's time.

        The guest may have sent output before this call.
        """
        self._execution, self._deadline = execution, deadline
        execution.ended.add_done_callback(lambda _: self._end())
        self._throttle()

    def receive(self, stream: Stream, data: bytes) -> None:
        """Add output of the command."""
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

    def timed_out(self) -> CommandTimeoutError:
        """Return the error for a command that did not end in time."""
        message = f"{shown(self._command)} did not end within {self._timeout:g} s, and is killed."
        error = CommandTimeoutError(message, seconds=self._timeout or 0.0)
        self._transport.explain(error)
        return error

    def _end(self) -> None:
        for stream, rest in self._partial.items():
            if rest:
                self._add(stream, rest)
        self._news.set()

    def _throttle(self) -> None:
        """Make the guest wait while too much output is unread, so that no output is lost."""
        if self._execution is None or self._execution.ended.done():
            return
        if not self._paused and self._waiting > BEHIND:
            self._paused = True
            self._execution.pause_reading()
        elif self._paused and self._waiting <= BEHIND // 2:
            self._paused = False
            self._execution.resume_reading()

    def __aiter__(self) -> LineStream:
        return self

    async def __anext__(self) -> Line:
        assert self._execution is not None
        while not self._lines:
            if self._execution.ended.done():
                if self._execution.exit_code is None:
                    raise self._transport.lost(self._execution)
                raise StopAsyncIteration
            self._process.check(shown(self._command), "Attach to the VM with from_id().")
            self._news.clear()
            try:
                async with GuestTimeout(self._transport.pauses, self._deadline):
                    await self._news.wait()
            except TimeoutError:
                raise self.timed_out() from None
        line, size = self._lines.popleft()
        self._waiting -= size
        self._throttle()
        return line
