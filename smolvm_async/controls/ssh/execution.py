"""One command that runs in the guest: what asyncssh tells of it, and how it is ended."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.script import killer
from smolvm_async.errors import ConnectionLostError

if TYPE_CHECKING:
    from asyncssh import SSHClientChannel, SSHClientConnection

AGAIN = 1.0  # seconds until a guest that could not be reached is tried again

Stream = Literal["stdout", "stderr"]


class Execution:
    """The callbacks of `asyncssh.SSHClientSession`, whose class would have to be imported.

    Attributes:
        exit_code: As of `subprocess`: negative for a signal; `None` while it runs, or if its end
            was never told.
        ended: Done when there is nothing more to come.
    """

    def __init__(self, receive: Callable[[Stream, bytes], None]) -> None:
        self.exit_code: int | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.channel: SSHClientChannel[bytes]
        self._receive = receive
        self._writable = asyncio.Event()
        self._writable.set()

    async def write(self, content: bytes) -> None:
        """Give it its input, and the end of it; it need not read it."""
        step = 1 << 16
        for start in range(0, len(content), step):
            await self._until_writable()
            if self.ended.done() or self.channel.is_closing():
                return
            self.channel.write(content[start : start + step])
        if not self.ended.done() and not self.channel.is_closing():
            self.channel.write_eof()

    async def _until_writable(self) -> None:
        if not self._writable.is_set():
            room = asyncio.ensure_future(self._writable.wait())
            either: list[asyncio.Future[Any]] = [room, self.ended]
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                room.cancel()

    async def kill(self, link: Link, mark: str) -> None:
        """Kill it, once the guest can be reached, and wait for its end."""
        killed = False
        while not killed and not self.ended.done():
            with suppress(ConnectionLostError):
                killed = await _kill(link, mark)
            if not killed:
                await asyncio.sleep(AGAIN)
        if not self.ended.done():
            self.channel.abort()
        await asyncio.wait([self.ended])

    # asyncssh's callbacks

    def connection_made(self, channel: SSHClientChannel[bytes]) -> None:
        """The session is there."""
        self.channel = channel

    def session_started(self) -> None:
        """The command has been started."""

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """It has printed something; the one data type that there is, is stderr."""
        self._receive("stdout" if datatype is None else "stderr", data)

    def eof_received(self) -> bool:
        """It has closed its output; its exit code comes later."""
        return True

    def exit_status_received(self, status: int) -> None:
        """It has ended."""
        self.exit_code = status

    def exit_signal_received(self, name: str, core: bool, message: str, language: str) -> None:
        """It was killed."""
        number = getattr(signal, f"SIG{name}", None)
        self.exit_code = -int(number) if number is not None else -1

    def pause_writing(self) -> None:
        """It does not read as fast as we write."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        """The session is over."""
        if not self.ended.done():
            self.ended.set_result(None)


async def _kill(link: Link, mark: str) -> bool:
    """Kill what has this mark; false if the guest did not do it."""
    async with link.apart(_opener(killer(mark), lambda _, __: None)) as killing:
        await asyncio.wait([killing.ended])
        return killing.exit_code is not None


def _opener(
    command: str, receive: Callable[[Stream, bytes], None]
) -> Callable[[SSHClientConnection], Awaitable[Execution]]:
    async def opener(connection: SSHClientConnection) -> Execution:
        session: Any = Execution(receive)
        await connection.create_session(lambda: session, command, encoding=None)
        execution: Execution = session
        return execution

    return opener


@asynccontextmanager
async def executing(
    link: Link,
    command: str,
    mark: str,
    receive: Callable[[Stream, bytes], None],
    on_turn: Callable[[bool], None] = lambda _: None,
) -> AsyncIterator[Execution]:
    """Execute a command for the time of the block, at the end of which it is killed.

    Args:
        mark: By which its processes are found; see `script()`.
        on_turn: See `Link.open()`.

    Raises:
        ConnectionLostError: If the guest cannot be reached.
    """

    async def kill(execution: Execution) -> None:
        await execution.kill(link, mark)

    execution = await link.open(_opener(command, receive), kill, on_turn)
    try:
        yield execution
    finally:
        if execution.ended.done():
            link.release()
        else:
            await link.end(kill(execution))
