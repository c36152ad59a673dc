"""Processes and terminals in a guest, which the caller talks to while they run.

Over SSH, both streams of a process share one session. While a stream has too much unread output,
the session pauses and the guest waits, so a caller who wants one stream only should join both in
the guest (`2>&1`).
"""

from __future__ import annotations

import asyncio
import signal as signals
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol, Self, cast

from smolvm_async.config.checks import check_boolean, check_integer, shown
from smolvm_async.controls.commands.commands import prepare
from smolvm_async.controls.commands.transport import (
    Command,
    Execution,
    OverTransport,
    ShellKind,
    Stream,
    TerminalKind,
    Transport,
)
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.fork import this_process

UNREAD = 1 << 20  # bytes; asyncio pauses at twice as many, and refuses longer lines
LOGIN_SHELL = 'exec "${SHELL:-/bin/sh}" -l'


class _Side(asyncio.ReadTransport):
    """The transport of a stream: asyncio pauses and resumes it."""

    def __init__(self, output: _Output, stream: Stream) -> None:
        super().__init__()
        self._output, self._stream = output, stream

    def pause_reading(self) -> None:
        self._output.full.add(self._stream)
        self._output.throttle()

    def resume_reading(self) -> None:
        self._output.full.discard(self._stream)
        self._output.throttle()


class _Output:
    """The unread output of a process. The guest waits while one stream is `full`."""

    def __init__(self) -> None:
        self.full: set[Stream] = set()
        self._paused = False
        self._execution: Execution | None = None
        self.stdout, self.stderr = (asyncio.StreamReader(UNREAD) for _ in range(2))
        self.stdout.set_transport(_Side(self, "stdout"))
        self.stderr.set_transport(_Side(self, "stderr"))

    def receive(self, stream: Stream, data: bytes) -> None:
        (self.stdout if stream == "stdout" else self.stderr).feed_data(data)

    def follow(self, execution: Execution) -> None:
        """Throttle this execution, whose first output may have come already."""
        self._execution = execution
        self.throttle()

    def throttle(self) -> None:
        if self._execution is None or self._execution.ended.done():
            return
        if bool(self.full) != self._paused:
            self._paused = bool(self.full)
            execution = self._execution
            (execution.pause_reading if self._paused else execution.resume_reading)()

    def end(self, error: Exception | None) -> None:
        for reader in (self.stdout, self.stderr):
            if error is None:
                reader.feed_eof()
            else:
                reader.set_exception(error)


class GuestProcess:
    """A running process in the guest. Leaving its `async with` block kills the process.

    Attributes:
        command: The command as it was passed.
        stdout: The output, as an `asyncio.StreamReader` of bytes: `async for line in stdout`,
            `read()`, `readline()`. More than 2 MiB of unread output make the process wait, also
            with its other stream. If the connection is lost, reading raises `ConnectionLostError`.
        stderr: The error output, in the same form.
    """

    def __init__(self, command: str, transport: Transport, *, detached: bool = False) -> None:
        self.command = command
        self._output = _Output()
        self.stdout, self.stderr = self._output.stdout, self._output.stderr
        self._transport = transport
        self._detached = detached
        self._maker = this_process()
        self._running = AsyncExitStack()
        self._leaving = False
        self._execution: Execution

    @property
    def exit_code(self) -> int | None:
        """The exit code as in `subprocess`, negative for a signal; `None` while it runs."""
        return self._execution.exit_code

    async def start(self, command: Command) -> None:
        """Start the process."""
        await self._transport.pauses.until_open()
        running = self._transport.executing(command, self._output.receive, lambda _: None)
        self._execution = await self._running.enter_async_context(running)
        self._execution.ended.add_done_callback(self._end)
        self._output.follow(self._execution)

    def _end(self, _: object) -> None:
        lost = self.exit_code is None and not self._detached and not self._leaving
        self._output.end(self._transport.lost(self._execution) if lost else None)

    async def write(self, data: str | bytes) -> None:
        """Write to the standard input, and wait while the process does not read.

        Data for a process that has ended is dropped.

        Raises:
            ConnectionLostError: The guest does not answer.
            FileTransferError: The input of a Windows guest's process cannot be written over SFTP.
        """
        self._check()
        if not isinstance(data, str | bytes | bytearray | memoryview):
            raise ConfigError(f"data={shown(data)} is wrong: pass bytes or str.")
        await self._execution.feed(data.encode() if isinstance(data, str) else bytes(data))

    def close_input(self) -> None:
        """End the standard input: the process reads an end of file."""
        self._check()
        self._execution.end_input()

    async def wait(self) -> int:
        """Wait for the end of the process, and return its exit code.

        Read the output meanwhile if there may be more than 2 MiB.

        Raises:
            ConnectionLostError: The guest or its SSH server was reset or has ended.
        """
        self._check()
        await asyncio.wait([self._execution.ended])
        if self.exit_code is None:
            raise self._transport.lost(self._execution)
        return self.exit_code

    async def send_signal(self, number: int) -> None:
        """Send a signal to the process and to all processes that it has started.

        Raises:
            ConnectionLostError: The guest does not answer.
            UnsupportedError: A Windows guest has no such signal.
        """
        self._check()
        try:
            name = signals.Signals(number).name.removeprefix("SIG")
        except ValueError:
            raise ConfigError(
                f"number={shown(number)} is wrong: pass a signal, such as signal.SIGHUP."
            ) from None
        if self._detached or not self._execution.ended.done():
            await self._execution.send_signal(name)

    async def terminate(self) -> None:
        """Send SIGTERM; see `send_signal()`."""
        await self.send_signal(signals.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL; see `send_signal()`."""
        await self.send_signal(signals.SIGKILL)

    def _check(self) -> None:
        self._maker.check(shown(self.command), "Attach to the VM with from_id().")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._maker.is_this:
            self._leaving = True
            await self._running.aclose()


class _TerminalExecution(Protocol):
    def resize(self, columns: int, rows: int) -> None: ...


class Terminal(GuestProcess):
    """A process in the guest with a terminal of its own; all output is in `stdout`."""

    async def resize(self, columns: int, rows: int) -> None:
        """Change the size of the terminal; the process gets SIGWINCH."""
        self._check()
        _check_size(columns, rows)
        cast(_TerminalExecution, self._execution).resize(columns, rows)


class Processes(OverTransport):
    """`AsyncSmolVM`'s processes and terminals."""

    async def spawn(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        shell: ShellKind = "raw",
        detached: bool = False,
    ) -> GuestProcess:
        r"""Start a process in the guest, and return while the process runs.

        ::

            async with await vm.spawn("sort") as process:
                await process.write("b\na\n")
                process.close_input()
                async for line in process.stdout:
                    print(line)
            print(process.exit_code)

        Leaving the block kills the process with all processes that it has started.

        Through a guest agent, input and output are in files of the guest until the process has
        ended, and come some 0.1 s late. In a Windows guest, each signal that ends programs kills
        the process, and there are no other signals; over SSH, each part of the input is a file
        until the process reads it. No Windows was run. See `run()` for the rest.

        Args:
            command, env, cwd, shell: See `run()`.
            detached: Whether the process goes on after its block, and after the end of this
                program, until it ends or the VM ends. It has no input and no output. Not in a
                Windows guest over SSH, whose server ends all processes of a session.

        Raises:
            ConnectionLostError, VMTimeoutError, VMNotRunningError, UnsupportedError, ConfigError:
                See `run()`.
        """
        self._require("spawn")
        if check_boolean("detached", detached):
            self._require("spawn(detached=True)")
        prepared = prepare(command, None, env, shell, None, cwd, self._shells)
        # `exec`: no shell stands between a signal and the program.
        text = prepared.text if prepared.words is None else f"exec {prepared.text}"
        transport = await self._transport("spawn")
        process = GuestProcess(prepared.text, transport, detached=detached)
        await process.start(prepared._replace(text=text, content=None, detached=detached))
        return process

    async def open_terminal(
        self,
        columns: int = 80,
        rows: int = 24,
        *,
        command: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        term: str = "xterm-256color",
    ) -> Terminal:
        r"""Start a process that has a terminal, by default a login shell of the user.

        ::

            async with await vm.open_terminal(120, 40) as terminal:
                await terminal.write("top\n")
                print(await terminal.stdout.read(4096))

        Leaving the block kills the process with all processes that it has started.

        Args:
            columns, rows: The size of the terminal, in characters.
            command: The command to run instead of the login shell.
            env, cwd: See `spawn()`.
            term: The kind of the terminal, for the variable `TERM`.

        Raises:
            UnsupportedError: The guest is reached through its agent, which has no terminals.
            ConnectionLostError, VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("open_terminal")
        _check_size(columns, rows)
        if not isinstance(term, str) or not term.isascii() or not term.isprintable() or not term:
            raise ConfigError(f"term={shown(term)} is wrong: pass a name, such as 'xterm'.")
        if command is None:
            command = LOGIN_SHELL
        kind = TerminalKind(term, columns, rows)
        prepared = prepare(command, None, env, "raw", None, cwd, self._shells)
        process = Terminal(command, await self._transport("open_terminal"))
        await process.start(prepared._replace(content=None, terminal=kind))
        return process


def _check_size(columns: int, rows: int) -> None:
    check_integer("columns", columns, 1, 10_000, "characters, from 1 to 10000")
    check_integer("rows", rows, 1, 10_000, "characters, from 1 to 10000")
