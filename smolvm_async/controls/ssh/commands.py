"""Commands in a guest: wait for their end, or read their output line by line."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, AnyStr, Generic, Literal, overload

from smolvm_async.config.checks import check_boolean, check_env, check_timeout, encoded, shown
from smolvm_async.controls.ssh.execution import Execution, Stream, executing
from smolvm_async.controls.ssh.link import Link, OverSSH
from smolvm_async.controls.ssh.script import check_command, script
from smolvm_async.errors import CommandFailedError, CommandTimeoutError, ConfigError
from smolvm_async.foundation.fork import this_process
from smolvm_async.foundation.tasks import in_background
from smolvm_async.qemu.pauses import GuestTimeout

BIG = 1 << 20  # bytes; a thread joins and decodes more output, so as not to block the event loop
QUOTED = 2000  # characters of output in an error message
MAX_LINE = 1 << 20  # bytes; a longer line comes in pieces
BEHIND = 1 << 20  # unread bytes to keep here before the guest must wait

ShellKind = Literal["raw", "login"]


@dataclass(frozen=True)
class CommandResult(Generic[AnyStr]):
    """The result of a command that has ended.

    Attributes:
        command: The command as it was passed.
        exit_code: The exit code as in `subprocess`: -9 if SIGKILL has killed the command.
        stdout: The output, as text (invalid UTF-8 becomes U+FFFD) or as bytes.
        stderr: The error output, in the same form.
        duration: Seconds from the command's start to its end, as seen from this process.
    """

    command: str
    exit_code: int
    stdout: AnyStr
    stderr: AnyStr
    duration: float

    @property
    def ok(self) -> bool:
        """Return whether the exit code is 0."""
        return self.exit_code == 0


@dataclass(frozen=True)
class Line:
    """A line of a command's output.

    Attributes:
        text: The line without its newline; invalid UTF-8 becomes U+FFFD.
        stream: `stdout` or `stderr`.
    """

    text: str
    stream: str


class LineStream:
    """An async iterator of `Line`s, which ends when the command ends.

    Attributes:
        exit_code: The exit code as in `subprocess`; `None` until the lines have ended.
    """

    def __init__(self, command: str, timeout: float | None, link: Link) -> None:
        self._process = this_process()
        self._command = command
        self._timeout = timeout
        self._deadline: float | None = None
        self._link = link
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
        self._link.explain(error)
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
                    raise self._link.lost()
                raise StopAsyncIteration
            self._process.check(shown(self._command), "Attach to the VM with from_id().")
            self._news.clear()
            try:
                async with GuestTimeout(self._link.pauses, self._deadline):
                    await self._news.wait()
            except TimeoutError:
                raise self.timed_out() from None
        line, size = self._lines.popleft()
        self._waiting -= size
        self._throttle()
        return line


class Commands(OverSSH):
    """`AsyncSmolVM`'s commands."""

    @overload
    async def run(
        self,
        command: str,
        timeout: float | None = 30,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
        check: bool = False,
        text: Literal[True] = True,
    ) -> CommandResult[str]: ...

    @overload
    async def run(
        self,
        command: str,
        timeout: float | None = 30,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
        check: bool = False,
        *,
        text: Literal[False],
    ) -> CommandResult[bytes]: ...

    async def run(
        self,
        command: str,
        timeout: float | None = 30,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
        check: bool = False,
        text: bool = True,
    ) -> CommandResult[Any]:
        """Run a command in the guest over SSH, and wait for its end.

        Cancelling the call kills the command and the processes that it started in the guest.

        Args:
            command: A command for the user's shell.
            timeout: Seconds from the start of the command until it is killed; `None` for no limit.
                The time of a pause does not count, unless QEMU paused the VM (as on a full disk).
                If the VM is paused already, also the seconds to wait for `resume()`.
            env: Variables for this command, in addition to the variables of `set_env_vars()`. They
                never appear on a command line.
            shell: `"raw"`: the user's shell runs the command as it is. `"login"`: a login shell
                reads the user's profile first, then runs the command.
            input: The standard input of the command; empty by default.
            check: Whether an exit code other than 0 is an error.
            text: Whether the output is text (invalid UTF-8 becomes U+FFFD) or bytes.

        Returns:
            Exit code, output and duration.

        Raises:
            CommandTimeoutError: The command took too long and was killed; has its output so far.
                Or the VM stayed paused.
            CommandFailedError: `check` is true, and the exit code is not 0.
            ConnectionLostError: The guest or its SSH server was reset or has ended.
            VMTimeoutError: The guest was not ready within `Timeouts.boot`.
            VMNotRunningError: The VM is not running.
            ConfigError: An argument is wrong, or the guest is Windows (a `ValueError`).
        """
        self._require("run")
        mark, line, content = _prepare(command, timeout, env, shell, input)
        for name, value in (("check", check), ("text", text)):
            check_boolean(name, value)
        link = await self._reach()
        await _until_open(link, command, timeout, text=text)
        output = Output(text)
        began = time.monotonic()
        try:
            async with link.pauses.timeout(None) as bound:
                start = partial(_bound, bound, timeout)
                async with executing(link, line, mark, output.receive, start) as execution:
                    await execution.write(content)
                    await asyncio.wait([execution.ended])
        except TimeoutError:
            stdout, stderr = await output.collected()
            error = CommandTimeoutError(
                f"{shown(command)} did not end within {timeout:g} s, and was killed.\n"
                f"{_quoted(stdout, stderr)}",
                stdout,
                stderr,
                seconds=timeout or 0.0,
            )
            raise link.explain(error) from None
        if execution.exit_code is None:
            raise link.lost()
        duration = time.monotonic() - began
        result = CommandResult(command, execution.exit_code, *await output.collected(), duration)
        if check and not result.ok:
            raise CommandFailedError(
                f"{shown(command)} ended with exit code {result.exit_code}.\n"
                f"{_quoted(result.stdout, result.stderr)}",
                result,
            )
        return result

    def run_stream(
        self,
        command: str,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
    ) -> AbstractAsyncContextManager[LineStream]:
        """Run a command and read its output line by line, as the command prints it.

        ::

            async with vm.run_stream("apt-get install -y ffmpeg") as lines:
                async for line in lines:
                    print(line.stream, line.text)
            print(lines.exit_code)

        Leaving the block kills the command if it is still running. A slow reader slows down the
        command: no output is lost, and at most a few MiB are kept in memory. A line of more than
        1 MiB comes in pieces.

        Args:
            command, timeout, env, shell, input: See `run()`; there is no timeout by default.

        Raises:
            CommandTimeoutError, ConnectionLostError: During the iteration; see `run()`.
            VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("run_stream")
        return self._stream(command, timeout, env, shell, input)

    @asynccontextmanager
    async def _stream(
        self,
        command: str,
        timeout: float | None,
        env: Mapping[str, str] | None,
        shell: ShellKind,
        input: str | bytes | None,
    ) -> AsyncIterator[LineStream]:
        mark, line, content = _prepare(command, timeout, env, shell, input)
        link = await self._reach()
        await _until_open(link, command, timeout)
        lines = LineStream(command, timeout, link)
        async with AsyncExitStack() as stack:
            try:
                async with link.pauses.timeout(None) as bound:
                    start = partial(_bound, bound, timeout)
                    session = executing(link, line, mark, lines.receive, start)
                    execution = await stack.enter_async_context(session)
            except TimeoutError:
                raise lines.timed_out() from None
            lines.follow(execution, bound.deadline)
            writing = asyncio.ensure_future(execution.write(content))
            try:
                yield lines
            finally:
                writing.cancel()


def _prepare(
    command: str,
    timeout: float | None,
    env: Mapping[str, str] | None,
    shell: ShellKind,
    input: str | bytes | None,
) -> tuple[str, str, bytes]:
    """Check the arguments; return the mark, the script and the standard input of the command."""
    check_command(command, shell)
    check_timeout(timeout)
    content, variables = _input(input), check_env(env)
    mark = secrets.token_hex(8)
    line, first = script(command, shell, variables, mark)
    return mark, line, first + content


async def _until_open(
    link: Link, command: str, timeout: float | None, *, text: bool = True
) -> None:
    """Wait at most `timeout` seconds for the end of a pause."""
    try:
        async with asyncio.timeout(timeout):
            await link.pauses.until_open()
    except TimeoutError:
        message = f"{shown(command)} was not started within {timeout:g} s."
        empty: Any = "" if text else b""
        error = CommandTimeoutError(message, empty, empty, seconds=timeout or 0.0)
        raise link.explain(error) from None


def _bound(bound: GuestTimeout, timeout: float | None, turn: bool) -> None:
    """Start the command's timeout when its session opens; stop it if the session is refused."""
    bound.restart(timeout if turn else None)


class Output:
    """The collected output of a command."""

    def __init__(self, text: bool) -> None:
        self._text = text
        self._chunks: dict[Stream, list[bytes]] = {"stdout": [], "stderr": []}

    def receive(self, stream: Stream, data: bytes) -> None:
        """Add output of the command."""
        self._chunks[stream].append(data)

    async def collected(self) -> tuple[Any, Any]:
        """Return all of stdout and all of stderr."""
        size = sum(len(chunk) for chunks in self._chunks.values() for chunk in chunks)
        return await in_background(self._join) if size > BIG else self._join()

    def _join(self) -> tuple[Any, Any]:
        stdout, stderr = (b"".join(self._chunks[name]) for name in ("stdout", "stderr"))
        if not self._text:
            return stdout, stderr
        return stdout.decode(errors="replace"), stderr.decode(errors="replace")


def _input(content: object) -> bytes:
    if content is None:
        return b""
    if isinstance(content, bytes):
        return content
    if isinstance(content, str) and (content_encoded := encoded(content)) is not None:
        return content_encoded
    raise ConfigError(
        f"input={shown(content)} is wrong: pass bytes, or str without lone surrogates."
    )


def _quoted(stdout: str | bytes, stderr: str | bytes) -> str:
    """Return the end of stderr, or else of stdout: many programs report errors there."""
    for name, output in (("stderr", stderr), ("stdout", stdout)):
        text = output if isinstance(output, str) else output.decode(errors="replace")
        if text := text[-QUOTED:].strip():
            return f"{name}: {text}"
    return "It wrote no output."
