"""One command in the guest: its SSH session, its exit code, and how to kill the command."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from smolvm_async.controls.commands.script import in_directory
from smolvm_async.controls.commands.transport import Command, Stream, TerminalKind
from smolvm_async.controls.commands.transport import Execution as AnyExecution
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.script import script, signaller
from smolvm_async.errors import ConnectionLostError
from smolvm_async.qemu.pauses import Pauses

if TYPE_CHECKING:
    from asyncssh import SSHClientChannel, SSHClientConnection

AGAIN = 1.0  # seconds between two attempts to kill a command
APART = "exec </dev/null >/dev/null 2>&1\n"  # the end of the session disturbs nothing
PTY_ECHO = 53  # RFC 4254, section 8

AnExecution = TypeVar("AnExecution", bound="Execution")


class Execution:
    """A running command.

    It has the callbacks of `asyncssh.SSHClientSession`, but does not derive from that class:
    importing asyncssh takes 0.3 s.

    Attributes:
        exit_code: The exit code as in `subprocess`: negative for a signal; `None` while the command
            runs, or if the connection was lost before the guest reported the exit code.
        ended: Done when the session is over.
    """

    def __init__(self, receive: Callable[[Stream, bytes], None]) -> None:
        self.exit_code: int | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.channel: SSHClientChannel[bytes]
        self._receive = receive
        self._writable = asyncio.Event()
        self._writable.set()

    async def feed(self, content: bytes) -> None:
        """Write a part of the command's standard input; stop early if the command ends."""
        step = 1 << 16
        for start in range(0, len(content), step):
            await self._until_writable()
            if self.ended.done() or self.channel.is_closing():
                return
            self.channel.write(content[start : start + step])

    def end_input(self) -> None:
        """End the command's standard input."""
        if not self.ended.done() and not self.channel.is_closing():
            self.channel.write_eof()

    def pause_reading(self) -> None:
        """Let the command wait until its output is read."""
        self.channel.pause_reading()

    def resume_reading(self) -> None:
        """Continue to read."""
        self.channel.resume_reading()

    async def _until_writable(self) -> None:
        if not self._writable.is_set():
            room = asyncio.ensure_future(self._writable.wait())
            either: list[asyncio.Future[Any]] = [room, self.ended]
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                room.cancel()

    # asyncssh calls the methods below.

    def connection_made(self, channel: SSHClientChannel[bytes]) -> None:
        """Keep the channel of the new session."""
        self.channel = channel

    def session_started(self) -> None:
        """Do nothing: the command has started."""

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Pass on output. SSH's only data type is stderr; stdout has no data type."""
        self._receive("stdout" if datatype is None else "stderr", data)

    def eof_received(self) -> bool:
        """Keep the session open at the end of the output: the exit code comes later."""
        return True

    def exit_status_received(self, status: int) -> None:
        """Keep the exit status."""
        self.exit_code = status

    def exit_signal_received(self, name: str, core: bool, message: str, language: str) -> None:
        """Keep the number of the signal that killed the command."""
        number = getattr(signal, f"SIG{name}", None)
        self.exit_code = -int(number) if number is not None else -1

    def pause_writing(self) -> None:
        """Stop writing: the command reads its input too slowly."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Continue to write."""
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        """Note that the session is over."""
        if not self.ended.done():
            self.ended.set_result(None)


class MarkedExecution(Execution):
    """A running command of the user, all processes of which have a mark.

    Args:
        receive: Called with all output.
        link: The connection.
        signaller: Returns the command that sends a signal to the marked processes.
        content: The standard input.
    """

    def __init__(
        self,
        receive: Callable[[Stream, bytes], None],
        link: Link,
        signaller: Callable[[str], str],
        content: bytes,
    ) -> None:
        super().__init__(receive)
        self._link = link
        self._signaller = signaller
        self._content = content

    async def begin(self) -> None:
        """Write the command itself; the caller writes its input."""
        await self.feed(self._content)

    async def write(self) -> None:
        """Write all of the command's standard input; stop early if the command ends."""
        await self.feed(self._content)
        self.end_input()

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the command's terminal, in characters."""
        if not self.ended.done():
            self.channel.change_terminal_size(columns, rows)

    async def send_signal(self, name: str) -> None:
        """Send a signal to all processes of the command: see `Execution.send_signal()`."""
        await self._signal(name)

    async def _signal(self, name: str) -> bool:
        """Send a signal; return whether the guest answered."""
        script = self._signaller(name)
        sending = await run_apart(self._link, lambda: script, lambda _: None)
        return sending.exit_code is not None

    async def kill(self) -> None:
        """Kill the command as soon as the guest answers, and wait for the command's end."""
        killed = False
        while not killed and not self.ended.done():
            with suppress(ConnectionLostError):
                killed = await self._signal("KILL")
            if not killed:
                await asyncio.sleep(AGAIN)
        if not self.ended.done():
            self.channel.abort()
        await asyncio.wait([self.ended])
        if not killed and self.exit_code is None:
            await self.kill_lost()

    async def kill_lost(self) -> None:
        """Kill the command after the loss of its connection, if the guest still answers."""
        from asyncssh import Error

        with suppress(ConnectionLostError, Error, OSError):
            await self._signal("KILL")


async def run_apart(
    link: Link, command: Callable[[], str], receive: Callable[[bytes], None]
) -> Execution:
    """Run a command of the library's own, without waiting in the queue, and wait for its end.

    Args:
        command: Returns the command, as soon as the guest answers.
        receive: Called with all output.
    """

    async def opener(connection: SSHClientConnection) -> Execution:
        execution = Execution(lambda _, data: receive(data))
        return await start(execution, command(), connection)

    async with link.apart(opener) as execution:
        await asyncio.wait([execution.ended])
        return execution


async def start(
    execution: AnExecution,
    command: str,
    connection: SSHClientConnection,
    terminal: TerminalKind | None = None,
) -> AnExecution:
    """Start a command on a connection."""
    options: dict[str, Any] = {}
    if terminal is not None:
        options = {
            "term_type": terminal.term,
            "term_size": (terminal.columns, terminal.rows),
            "term_modes": {PTY_ECHO: 0},  # until the script has read its variables
        }
    line: Any = command.encode(errors="surrogateescape")  # as os.fsdecode() made it from bytes
    await connection.create_session(lambda: cast(Any, execution), line, encoding=None, **options)
    return execution


async def find_shell(link: Link) -> None:
    """Find out which shell a Windows guest's server gives commands to, if this is not known."""
    from smolvm_async.controls.ssh.windows import QUESTION, shell_of

    async with link.shell_turn:
        if link.shell:
            return
        said = bytearray()
        await link.pauses.until_open()
        asking = await run_apart(link, lambda: QUESTION, said.extend)
        if asking.exit_code is None:
            raise link.lost()
        link.shell = shell_of(bytes(said))


class SSHTransport(NamedTuple):
    """The way to run commands over SSH: a `Transport`."""

    link: Link
    windows: bool = False

    @property
    def pauses(self) -> Pauses:
        """Return whether the guest is paused."""
        return self.link.pauses

    def explain(self, error: Any) -> Any:
        """Add the VM's troubles to the error of a deadline."""
        return self.link.explain(error)

    def lost(self, _: AnyExecution) -> ConnectionLostError:
        """Return the error for a command whose connection was lost."""
        return self.link.lost()

    async def _prepared(
        self, command: Command, receive: Callable[[Stream, bytes], None]
    ) -> tuple[str, Callable[[], MarkedExecution]]:
        """Return the line that runs a command, and the class of its execution with arguments."""
        mark = secrets.token_hex(8)
        if self.windows:
            from smolvm_async.controls.ssh import windows

            await find_shell(self.link)
            line, content = windows.line(self.link.shell, mark), windows.content(command, mark)
            arguments = (receive, self.link, partial(windows.signaller, mark), content)
            if command.content is not None:
                return line, partial(MarkedExecution, *arguments)
            from smolvm_async.controls.ssh.live_input import FedExecution

            return line, partial(FedExecution, *arguments, windows.directory(mark))
        text = f"{APART}{command.text}" if command.detached else command.text
        line, first = script(
            in_directory(text, command.cwd),
            command.shell,
            command.env,
            mark,
            terminal=command.terminal is not None,
        )
        content = first + (command.content or b"")
        to_signal = partial(signaller, mark)
        return line, partial(MarkedExecution, receive, self.link, to_signal, content)

    @asynccontextmanager
    async def executing(
        self,
        command: Command,
        receive: Callable[[Stream, bytes], None],
        on_turn: Callable[[bool], None],
    ) -> AsyncIterator[MarkedExecution]:
        """Run a command during the block: see `Transport.executing()`."""
        link, terminal = self.link, command.terminal
        line, make = await self._prepared(command, receive)

        async def opener(connection: SSHClientConnection) -> MarkedExecution:
            return await start(make(), line, connection, terminal)

        def release(_: object) -> None:
            link.release()

        execution = await link.open(opener, MarkedExecution.kill, on_turn)
        execution.ended.add_done_callback(release)
        try:
            if command.content is None:
                await execution.begin()
            yield execution
        finally:
            if not execution.ended.done():
                if command.detached:
                    execution.channel.close()
                else:
                    execution.ended.remove_done_callback(release)  # `end()` does this, too
                    await link.end(execution.kill())
            elif execution.exit_code is None and not command.detached:
                link.go_on(execution.kill_lost())
