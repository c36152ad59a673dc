"""The one SSH connection to a guest, and the sessions on it.

asyncssh is imported when it is first needed, and in a thread: that takes 0.3 s.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from smolvm_async.controls.ssh.login import Access
from smolvm_async.errors import ConnectionLostError
from smolvm_async.foundation.tasks import (
    has_result,
    in_background,
    no_collection,
    settle,
    take_exception,
)

if TYPE_CHECKING:
    from asyncssh import SFTPClient, SSHClientConnection

MOST = 256  # sessions at a time; more only wait for each other in the guest


class Sessions:
    """How many sessions there may be: the server's limit is known once it has refused one.

    OpenSSH's is 10, unless `MaxSessions` says otherwise.
    """

    def __init__(self) -> None:
        self._entered = self._opened = 0
        self._limit = MOST
        self._learnt = 0  # how often
        self._waiting: list[asyncio.Future[None]] = []

    async def enter(self) -> int:
        """Wait for room, first come, first served; returns what `refused()` wants."""
        if self._entered >= self._limit or self._waiting:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:  # it was ours already
                    self.give_up()
                raise
        else:
            self._entered += 1
        return self._learnt

    def opened(self) -> None:
        """The server has given one to whom has entered."""
        self._opened += 1

    def leave(self) -> None:
        """One that was opened has ended."""
        self._opened -= 1
        self.give_up()

    def give_up(self) -> None:
        """Who has entered leaves without one."""
        self._entered -= 1
        self._admit()

    def refused(self, learnt: int) -> bool:
        """The server has none for whom has entered; false if no other one could end either.

        Of many refusals at once the first one tells the limit: by the later ones, some have ended.
        """
        if self._opened and learnt == self._learnt:
            self._limit = min(self._limit, self._opened)
            self._learnt += 1
        self.give_up()
        return self._opened > 0

    def forget_limit(self) -> None:
        """The server may be another one."""
        self._limit = MOST
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._entered < self._limit:
            turn = self._waiting.pop(0)
            if not turn.done():
                self._entered += 1
                turn.set_result(None)


# Seconds for the server's first word: QEMU's network accepts before the guest listens, and then
# nobody speaks. A slow guest must get the time for it, or it would begin anew for ever.
GREETING, LONGEST_GREETING = 0.3, 10.0
LOGIN = 30.0  # seconds from the greeting to the end of the key exchange and the login
PATIENCE = 30.0  # seconds to connect again, to a guest that was ready before
RETRY = 0.05  # seconds
TRIES = 10  # to open the one session that there is
ENDING = 2.0  # seconds to wait for a session to end; after that it ends behind our back
KEEPALIVE = 15  # seconds without a sign of the guest, thrice: the connection is dropped

# Those of OpenSSH and of dropbear that cost an emulated processor least, first.
CIPHERS = ["aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes128-ctr"]

T = TypeVar("T")


class Link:
    """Connects when it is needed, again if the connection was lost, and shares it."""

    def __init__(self, vm_id: str, access: Callable[[], Awaitable[Access]]) -> None:
        self._vm_id = vm_id
        self._access = access
        self._connection: SSHClientConnection | None = None
        self._connecting: asyncio.Task[SSHClientConnection | None] | None = None
        self._sessions = Sessions()
        self._endings: set[asyncio.Task[None]] = set()
        self._closed = False
        self._greeting = GREETING

    async def connect(self) -> bool:
        """Connect, if the guest's server answers by now; a guest that boots is asked often."""
        try:
            return await self._connected() is not None
        except ConnectionLostError:
            return False

    def close(self) -> None:
        """Drop the connection for good: the VM has ended."""
        self._closed = True
        self.abort()
        for ending in self._endings:
            ending.cancel()

    def abort(self) -> None:
        """Drop the connection: whatever is going on over it fails."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    async def open(
        self,
        opener: Callable[[SSHClientConnection], Awaitable[T]],
        end: Callable[[T], Coroutine[None, None, None]],
        on_turn: Callable[[bool], None] = lambda _: None,
    ) -> T:
        """Open a session, once the server has room for one; `release()` or `end()` gives it back.

        Args:
            opener: Opens it on a connection.
            end: Ends what a cancelled opening has opened after all.
            on_turn: Called with true once there is room for it, false if there is none after all.

        Raises:
            ConnectionLostError: If the guest does not answer.
        """
        tries = 0
        while True:
            connection = await self._patiently_connected()
            from asyncssh import ChannelOpenError, Error  # imported in a thread by now

            learnt = await self._sessions.enter()
            on_turn(True)
            opening = asyncio.ensure_future(opener(connection))
            opening.add_done_callback(self._opened)
            try:
                return await asyncio.shield(opening)
            except asyncio.CancelledError:
                await self._wait_awhile(self._end_late(opening, end))
                raise
            except ChannelOpenError as error:
                others = self._sessions.refused(learnt)
                on_turn(False)
                if connection.is_closed():
                    raise self.lost() from error
                if not others:  # it may not know yet that the last one has ended
                    tries += 1
                    if tries == TRIES:
                        raise self._lost(f"its SSH server refuses sessions: {error}") from error
                    await asyncio.sleep(RETRY)
            except (Error, OSError) as error:
                self._sessions.give_up()
                raise self._lost(str(error)) from error

    def _opened(self, opening: asyncio.Future[Any]) -> None:
        if has_result(opening):
            self._sessions.opened()

    def release(self) -> None:
        """A session has ended."""
        self._sessions.leave()

    async def end(self, ending: Coroutine[None, None, None]) -> None:
        """End a session, which counts until then.

        It is waited for, cancelled or not, unless the guest hangs: then it ends behind our back.
        """
        await self._wait_awhile(self._end(ending))

    async def _wait_awhile(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        await settle(asyncio.wait([task], timeout=ENDING))

    async def _end(self, ending: Coroutine[None, None, None]) -> None:
        from asyncssh import Error

        try:
            with suppress(ConnectionLostError, Error, OSError):  # it has ended with the connection
                await ending
        finally:
            self._sessions.leave()

    async def _end_late(
        self, opening: Awaitable[T], end: Callable[[T], Coroutine[None, None, None]]
    ) -> None:
        from asyncssh import Error

        try:
            opened = await opening
        except (Error, OSError):
            self._sessions.give_up()
        else:
            await self._end(end(opened))

    @asynccontextmanager
    async def apart(
        self, opener: Callable[[SSHClientConnection], Awaitable[T]]
    ) -> AsyncIterator[T]:
        """A session that waits for no other: where ours are all taken, on a second connection.

        Raises:
            ConnectionLostError: If the guest does not answer.
        """
        connection, second = await self._patiently_connected(), None
        from asyncssh import ChannelOpenError

        try:
            try:
                opened = await opener(connection)
            except ChannelOpenError:
                second = await self._log_in()
                if second is None:
                    raise self.lost() from None
                opened = await opener(second)
            yield opened
        finally:
            if second is not None:
                second.abort()

    @asynccontextmanager
    async def sftp(self) -> AsyncIterator[SFTPClient]:
        """A session for files.

        Raises:
            ConnectionLostError: If the guest does not answer.
        """
        client = await self.open(lambda connection: connection.start_sftp_client(), _exit)
        try:
            yield client
        finally:
            await self.end(_exit(client))

    async def _patiently_connected(self) -> SSHClientConnection:
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while (connection := await self._connected()) is None:
            if asyncio.get_running_loop().time() > deadline:
                raise self._lost(f"its SSH server has not answered for {PATIENCE:g} s")
            await asyncio.sleep(RETRY)
        return connection

    async def _connected(self) -> SSHClientConnection | None:
        """The connection; all who want one wait for the same attempt."""
        if self._closed:
            raise self._lost("the VM has ended")
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        if self._connecting is None:
            self._connecting = asyncio.ensure_future(self._attempt())
            self._connecting.add_done_callback(self._attempted)
        attempt = self._connecting
        await asyncio.wait([attempt])
        return None if attempt.cancelled() else attempt.result()  # cancelled by abort()

    def _attempted(self, attempt: asyncio.Task[Any]) -> None:
        self._connecting = None
        take_exception(attempt)

    async def _attempt(self) -> SSHClientConnection | None:
        connection = await self._log_in()
        if connection is not None:
            self._connection = connection
            self._sessions.forget_limit()
        return connection

    async def _log_in(self) -> SSHClientConnection | None:
        """A new connection; `None` if no server answers by now."""
        access = await self._access()
        try:
            ours = await greeted(access.port, self._greeting)
        except TimeoutError:
            self._greeting = min(self._greeting * 1.5, LONGEST_GREETING)
            return None
        self._greeting = GREETING
        if ours is None:
            return None
        try:
            return await _log_in(ours, access)
        except BaseException as error:
            ours.close()
            if isinstance(error, Exception):
                raise self._lost(f"logging in failed: {error}") from error
            raise

    def _lost(self, reason: str) -> ConnectionLostError:
        return ConnectionLostError(f"{self._vm_id} cannot be reached over SSH: {reason}.")

    def lost(self) -> ConnectionLostError:
        """What to raise for a session that ended without a word."""
        return self._lost(
            "the connection was lost; the guest was reset or has ended, or its SSH server died"
        )


async def greeted(port: int, timeout: float) -> socket.socket | None:
    """A connection to a server that has begun to speak, its words unread; `None` if none listens.

    Raises:
        TimeoutError: If it has not spoken within `timeout` seconds.
    """
    loop = asyncio.get_running_loop()
    ours = socket.socket()
    try:
        ours.setblocking(False)
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(timeout):
            await loop.sock_connect(ours, ("127.0.0.1", port))
            readable = asyncio.Event()
            loop.add_reader(ours, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(ours)
        if ours.recv(1, socket.MSG_PEEK):
            return ours
    except BaseException as error:
        ours.close()
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            return None
        raise
    ours.close()
    return None


async def _exit(client: SFTPClient) -> None:
    client.exit()
    await client.wait_closed()


async def _log_in(ours: socket.socket, access: Access) -> SSHClientConnection:
    if "asyncssh" not in sys.modules:
        await in_background(no_collection()(importlib.import_module), "asyncssh")
    import asyncssh

    known: Any = ([asyncssh.import_public_key(access.host_key)], [], [])
    async with asyncio.timeout(LOGIN):
        return await asyncssh.connect(
            sock=ours,
            username=access.user,
            client_keys=[asyncssh.import_private_key(access.private_key)],
            known_hosts=known,
            config=None,
            agent_path=None,
            preferred_auth="publickey",
            encryption_algs=CIPHERS,
            compression_algs=["none"],
            login_timeout=LOGIN,
            keepalive_interval=KEEPALIVE,
        )
