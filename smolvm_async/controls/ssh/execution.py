"""One command in the guest: its SSH session, its exit code, and how to kill the command."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from smolvm_async.controls.commands.script import in_directory
from smolvm_async.controls.commands.transport import Command, Stream
from smolvm_async.controls.commands.transport import Execution as AnyExecution
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.script import script, signaller
from smolvm_async.errors import ConnectionLostError
from smolvm_async.qemu.pauses import Pauses

if TYPE_CHECKING:
    from asyncssh import SSHClientChannel, SSHClientConnection

AGAIN = 1.0  # seconds between two attempts to kill a command


class Execution:
    """A running command.

    It has the callbacks of `asyncssh.SSHClientSession`, but does not derive from that class:
    importing asyncssh takes 0.3 s.

    Attributes:
        exit_code: The exit code as in `subprocess`: negative for a signal; `None` while the command
            runs, or if the connection was lost before the guest reported the exit code.
        ended: Done when the session is over.
    """

    def __init__(self, receive: Callable[[Stream, bytes], None], content: bytes = b"") -> None:
        self.exit_code: int | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.channel: SSHClientChannel[bytes]
        self._receive = receive
        self._content = content  # the standard input
        self._writable = asyncio.Event()
        self._writable.set()

    async def write(self) -> None:
        """Write all of the command's standard input; stop early if the command ends."""
        await self.feed(self._content)
        self.end_input()

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

    async def kill(self, link: Link, mark: str) -> None:
        """Kill the command as soon as the guest answers, and wait for the command's end."""
        killed = False
        while not killed and not self.ended.done():
            with suppress(ConnectionLostError):
                killed = await _kill(link, mark)
            if not killed:
                await asyncio.sleep(AGAIN)
        if not self.ended.done():
            self.channel.abort()
        await asyncio.wait([self.ended])

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


async def _kill(link: Link, mark: str) -> bool:
    """Kill the processes with this mark; return whether the guest answered."""
    return await send_signal(link, mark, "KILL")


async def send_signal(link: Link, mark: str, name: str) -> bool:
    """Send a signal to the processes with this mark; return whether the guest answered."""
    sending = await run_apart(link, lambda: signaller(mark, name), lambda _: None)
    return sending.exit_code is not None


async def run_apart(
    link: Link, command: Callable[[], str], receive: Callable[[bytes], None]
) -> Execution:
    """Run a command of the library's own, without waiting in the queue, and wait for its end.

    Args:
        command: Returns the command, as soon as the guest answers.
        receive: Called with all output.
    """

    async def opener(connection: SSHClientConnection) -> Execution:
        return await open_session(command(), lambda _, data: receive(data), connection)

    async with link.apart(opener) as execution:
        await asyncio.wait([execution.ended])
        return execution


async def open_session(
    command: str,
    receive: Callable[[Stream, bytes], None],
    connection: SSHClientConnection,
    content: bytes = b"",
    terminal: Mapping[str, Any] | None = None,
) -> Execution:
    """Start a command. `terminal` has asyncssh's arguments for a terminal."""
    execution = Execution(receive, content)
    line: Any = command.encode(errors="surrogateescape")  # as os.fsdecode() made it from bytes
    options = terminal or {}
    await connection.create_session(lambda: cast(Any, execution), line, encoding=None, **options)
    return execution


class SSHTransport(NamedTuple):
    """The way to run commands over SSH: a `Transport`."""

    link: Link

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

    @asynccontextmanager
    async def executing(
        self,
        command: Command,
        receive: Callable[[Stream, bytes], None],
        on_turn: Callable[[bool], None],
    ) -> AsyncIterator[Execution]:
        """Run a command during the block: see `Transport.executing()`."""
        link, mark = self.link, secrets.token_hex(8)
        text = in_directory(command.text, command.cwd)
        line, first = script(text, command.shell, command.env, mark)

        async def kill(execution: Execution) -> None:
            await execution.kill(link, mark)

        opener = partial(open_session, line, receive, content=first + command.content)
        execution = await link.open(opener, kill, on_turn)
        try:
            yield execution
        finally:
            if execution.ended.done():
                link.release()
            else:
                await link.end(kill(execution))
