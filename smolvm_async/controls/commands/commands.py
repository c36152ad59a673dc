"""Commands in a guest: wait for their end, or read their output line by line."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Literal, overload

from smolvm_async.config.checks import check_boolean, check_env, check_timeout, encoded, shown
from smolvm_async.controls.commands.lines import LineStream
from smolvm_async.controls.commands.result import CommandResult
from smolvm_async.controls.commands.script import check_command, check_directory, check_words
from smolvm_async.controls.commands.transport import (
    Command,
    OverTransport,
    ShellKind,
    Stream,
    Transport,
)
from smolvm_async.errors import CommandFailedError, CommandTimeoutError, ConfigError
from smolvm_async.foundation.tasks import in_background
from smolvm_async.qemu.pauses import GuestTimeout

BIG = 1 << 20  # bytes; a thread joins and decodes more output, so as not to block the event loop
QUOTED = 2000  # characters of output in an error message


class Commands(OverTransport):
    """`AsyncSmolVM`'s commands."""

    @overload
    async def run(
        self,
        command: str | Sequence[str],
        timeout: float | None = 30,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
        check: bool = False,
        text: Literal[True] = True,
        cwd: str | None = None,
    ) -> CommandResult[str]: ...

    @overload
    async def run(
        self,
        command: str | Sequence[str],
        timeout: float | None = 30,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
        check: bool = False,
        *,
        text: Literal[False],
        cwd: str | None = None,
    ) -> CommandResult[bytes]: ...

    async def run(
        self,
        command: str | Sequence[str],
        timeout: float | None = 30,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
        check: bool = False,
        text: bool = True,
        cwd: str | None = None,
    ) -> CommandResult[Any]:
        """Run a command in the guest, and wait for its end.

        Cancelling the call kills the command and the processes that it started in the guest.

        In a Windows guest, the QEMU guest agent runs the command as LocalSystem in session 0: the
        command may do everything, but nobody sees its windows. To start a program on the desktop,
        press `Meta+r` with `vm.keyboard`, and type its name and Enter. PowerShell reads no profile,
        and gets the input as the lines of `$input`. Commands print UTF-8, if they follow the code
        page of their console. A child whose parent has ended before is not killed. No Windows was
        run to test this.

        Args:
            command: A command for the user's shell (PowerShell in a Windows guest), or a list: a
                program and its arguments.
            timeout: Seconds from the start of the command until it is killed; `None` for no limit.
                The time of a pause does not count, unless QEMU paused the VM (as on a full disk).
                If the VM is paused already, also the seconds to wait for `resume()`.
            env: Variables for this command, in addition to the variables of `set_env_vars()`. They
                never appear on a command line.
            shell: `"raw"`: the user's shell runs the command as it is. `"login"` (Linux): a login
                shell reads the user's profile first, then runs the command. `"cmd"` (Windows):
                cmd.exe runs the command as a batch file.
            input: The standard input of the command; empty by default.
            check: Whether an exit code other than 0 is an error.
            text: Whether the output is text (invalid UTF-8 becomes U+FFFD) or bytes.
            cwd: The directory to start in; by default the user's home. If the directory does not
                exist, the exit code is 126.

        Returns:
            Exit code, output and duration.

        Raises:
            CommandTimeoutError: The command took too long and was killed; has its output so far.
                Or the VM stayed paused.
            CommandFailedError: `check` is true, and the exit code is not 0.
            ConnectionLostError: The guest or its SSH server was reset or has ended.
            VMTimeoutError: The guest was not ready within `Timeouts.boot`.
            VMNotRunningError: The VM is not running.
            UnsupportedError: The guest has to run the QEMU guest agent, and does not.
            ConfigError: An argument is wrong (a `ValueError`).
        """
        self._require("run")
        prepared = prepare(command, timeout, env, shell, input, cwd, self._shells)
        command = prepared.text
        for name, value in (("check", check), ("text", text)):
            check_boolean(name, value)
        transport = await self._transport("run")
        await _until_open(transport, command, timeout, text=text)
        output = Output(text)
        began = time.monotonic()
        try:
            async with transport.pauses.timeout(None) as bound:
                start = partial(_bound, bound, timeout)
                running = transport.executing(prepared, output.receive, start)
                async with running as execution:
                    await execution.write()
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
            raise transport.explain(error) from None
        if execution.exit_code is None:
            raise transport.lost(execution)
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
        command: str | Sequence[str],
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
        cwd: str | None = None,
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
            command, timeout, env, shell, input, cwd: See `run()`; there is no timeout by default.

        Raises:
            CommandTimeoutError, ConnectionLostError: During the iteration; see `run()`.
            VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("run_stream")
        return self._stream(command, timeout, env, shell, input, cwd)

    @asynccontextmanager
    async def _stream(
        self,
        command: str | Sequence[str],
        timeout: float | None,
        env: Mapping[str, str] | None,
        shell: ShellKind,
        input: str | bytes | None,
        cwd: str | None,
    ) -> AsyncIterator[LineStream]:
        prepared = prepare(command, timeout, env, shell, input, cwd, self._shells)
        command = prepared.text
        transport = await self._transport("run_stream")
        await _until_open(transport, command, timeout)
        lines = LineStream(command, timeout, transport)
        async with AsyncExitStack() as stack:
            try:
                async with transport.pauses.timeout(None) as bound:
                    start = partial(_bound, bound, timeout)
                    running = transport.executing(prepared, lines.receive, start)
                    execution = await stack.enter_async_context(running)
            except TimeoutError:
                raise lines.timed_out() from None
            lines.follow(execution, bound.deadline)
            writing = asyncio.ensure_future(execution.write())
            try:
                yield lines
            finally:
                writing.cancel()


def prepare(
    command: str | Sequence[str],
    timeout: float | None,
    env: Mapping[str, str] | None,
    shell: ShellKind,
    input: str | bytes | None,
    cwd: str | None,
    shells: Sequence[str],
) -> Command:
    """Check the arguments of a command."""
    words = None
    if not isinstance(command, str):
        words = check_words(command, shell)
        command = shlex.join(words)
    check_command(command, shell, shells)
    check_timeout(timeout)
    return Command(command, shell, check_env(env), _input(input), check_directory(cwd), words)


async def _until_open(
    transport: Transport, command: str, timeout: float | None, *, text: bool = True
) -> None:
    """Wait at most `timeout` seconds for the end of a pause."""
    try:
        async with asyncio.timeout(timeout):
            await transport.pauses.until_open()
    except TimeoutError:
        message = f"{shown(command)} was not started within {timeout:g} s."
        empty: Any = "" if text else b""
        error = CommandTimeoutError(message, empty, empty, seconds=timeout or 0.0)
        raise transport.explain(error) from None


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
