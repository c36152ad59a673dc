"""The SSH connection of this process to a guest, and the sessions on it.

A `Link` belongs to one run of a VM in one process: the VM's owner and every attached process have
their own `Link`. The link owns the connection; commands and transfers open sessions on it.

Opening the connection needs some care:

- QEMU's network accepts a connection to a forwarded port before the guest's SSH server listens,
  and then sends nothing. So only the server's greeting proves that the server answers.
- A connection that QEMU accepted too early never gets a greeting. Waiting until it times out would
  make a boot look twice as long. So the link polls: it connects, waits a short time for the first
  byte of the greeting, and repeats both until the server answers.
- A slow guest may need more than this short time to send its greeting. It would start over for each
  new connection and never finish, so the link waits longer after each time-out.
- The link peeks at the first byte of the greeting, then gives the socket to asyncssh, which reads
  the whole greeting. asyncssh needs no host name, since the socket is a TCP connection (not a
  socketpair), and accepts only the host key that we gave to the guest.
- Only one attempt runs at a time, as a task that all callers wait for. Cancelling a caller does not
  cancel the task; `abort()` does. The link closes the socket unless asyncssh has taken it over.
- A guest with a busy processor finishes no login of many at once. So logins take turns: those of
  the clones of this process, and those of all processes that are attached to a VM.
- Nothing waits in vain for a paused guest (see `Pauses`): no attempt starts, every deadline stands
  still, and the connection needs no keep-alive.
- `abort()` drops the connection after a reset of the guest, since the network does not report the
  reset; the next caller connects again. `close()` drops it for good, at the end of the run.

The first connection imports asyncssh in a thread, since the import takes 0.3 s.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from smolvm_async.controls.ssh.client import find_refusal, import_asyncssh, log_in
from smolvm_async.controls.ssh.login import Access
from smolvm_async.errors import ConnectionLostError, LoginError
from smolvm_async.foundation.fork import end_in_child, private
from smolvm_async.foundation.tasks import (
    Turns,
    has_result,
    settle,
    take_exception,
)
from smolvm_async.qemu.pauses import Pauses

if TYPE_CHECKING:
    from asyncssh import SFTPClient, SSHClientConnection

MOST = 256  # sessions at a time; more sessions would only wait for each other in the guest
GREETING, LONGEST_GREETING = 0.3, 10.0  # seconds to wait for the greeting, at first and at most
LONGER = 1.5  # the factor by which the wait for the greeting grows after a time-out
LOGIN = 30.0  # seconds from the greeting to the end of the key exchange and the login
PATIENCE = 30.0  # seconds to connect again to a guest that was ready before
RETRY = 0.05  # seconds between two attempts
TRIES = 10  # attempts to open a session while no other session is open
ENDING = 2.0  # seconds to wait for a session to end; after that it ends in the background
KEEPALIVE = 15  # seconds without data from the guest; asyncssh disconnects after 3 such periods

T = TypeVar("T")

_login_turns = Turns()  # under TCG, 16 clones at once take 30 % longer to answer than two at a time


class Sessions:
    """The count of sessions on a connection, and the queue for them.

    The server does not report how many sessions it allows (OpenSSH: 10, or `MaxSessions`). When it
    refuses a session, the limit becomes the number of sessions that are open. A caller takes a
    place by `enter()`, and releases the place by `leave()` or, without a session, `give_up()`.
    """

    def __init__(self) -> None:
        self._entered = self._opened = 0
        self._limit = MOST
        self._learned = 0  # how often the limit was learned
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def busy(self) -> bool:
        """True while a place is taken."""
        return self._entered > 0

    async def enter(self) -> int:
        """Wait for a place, in the order of the calls; return the argument for `refused()`."""
        if self._entered >= self._limit or self._waiting:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:  # this caller already has the place
                    self.give_up()
                raise
        else:
            self._entered += 1
        return self._learned

    def opened(self) -> None:
        """Note that the server opened the session."""
        self._opened += 1

    def leave(self) -> None:
        """Release the place of a session that has ended."""
        self._opened -= 1
        self.give_up()

    def give_up(self) -> None:
        """Release the place of a caller that has no session."""
        self._entered -= 1
        self._admit()

    def refused(self, learned: int) -> bool:
        """Note that the server refused the session; return whether another session is open.

        Of many refusals at once, only the first refusal shows the limit: some sessions have ended
        before the later refusals are handled.
        """
        if self._opened and learned == self._learned:
            self._limit = min(self._limit, self._opened)
            self._learned += 1
        self.give_up()
        return self._opened > 0

    def forget_limit(self) -> None:
        """Forget the limit: a new connection may lead to another server."""
        self._limit = MOST
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._entered < self._limit:
            turn = self._waiting.pop(0)
            if not turn.done():
                self._entered += 1
                turn.set_result(None)


class _SharedSFTP:
    """An SFTP session with several users; the last user closes the session."""

    def __init__(self, sftp: SFTPClient, closing: AsyncExitStack) -> None:
        self.sftp, self.closing = sftp, closing
        self.users = 0


class Link:
    """The SSH connection, opened on demand, reopened after a loss, and shared by all callers.

    Args:
        vm_id: The VM's id, for messages.
        access: Returns the server's port and the keys.
        pauses: Tells whether the guest is paused.
        explain: Adds the VM's troubles to an error; see `Troubles.explain()`.
        turn: Returns a block that takes turns with other logins, for a server that is `serving`.
        final: Whether a refused login is final: the server and the account are the image's own. The
            keys that this library has made are in force only after a part of the boot.

    Attributes:
        host_key: The host key of the server that has accepted the login; empty before.
        shell: The kind of the shell that the server gives commands to; see `ssh/windows.py`.
        serving: Whether the guest's server certainly runs, as in a clone of a guest that was ready.
    """

    def __init__(
        self,
        vm_id: str,
        access: Callable[[], Awaitable[Access]],
        pauses: Pauses,
        explain: Callable[[Any], Any] = lambda error: error,
        turn: Callable[[], AbstractAsyncContextManager[None]] = _login_turns.take,
        *,
        final: bool = False,
    ) -> None:
        self.explain = explain
        self._turn = turn
        self._final = final
        self.host_key = self.shell = ""
        self._queued = 0.0  # seconds spent in waiting for turns
        self.pauses = pauses
        pauses.watchers.add(self._keep_alive)
        self._vm_id = vm_id
        self._access = access
        self._connection: SSHClientConnection | None = None
        self._connecting: asyncio.Task[SSHClientConnection | None] | None = None
        self._sessions = Sessions()
        self._endings: set[asyncio.Task[None]] = set()
        self._closed = False
        self._openings = 0  # calls of `open()`
        self._used = 0.0
        self._greeting = GREETING
        self.serving = False
        self.env_turn = asyncio.Lock()  # for writers of the guest's environment variables
        self.shell_turn = asyncio.Lock()  # many commands ask for `shell` once
        self._shared: _SharedSFTP | None = None
        self._shared_turn = asyncio.Lock()

    @property
    def last_use(self) -> float:
        """The time of the last use, of `time.monotonic()`: now, while a session is open."""
        if self._openings or self._sessions.busy:
            self._used = time.monotonic()
        return self._used

    async def connect(self) -> bool:
        """Try once to connect; return whether the guest's server answered.

        A caller that waits for a booting guest calls this repeatedly.

        Raises:
            LoginError: The server refused the login, or is another one, and this is final.
        """
        try:
            return await self._connected() is not None
        except LoginError:
            raise
        except ConnectionLostError:
            return False

    def close(self) -> None:
        """Drop the connection for good: the VM has ended."""
        self._closed = True
        self.pauses.watchers.discard(self._keep_alive)
        self.abort()
        for ending in self._endings:
            ending.cancel()

    def abort(self) -> None:
        """Drop the connection. Every command and transfer on it fails."""
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
        """Open a session as soon as the server has room; `release()` or `end()` frees its place.

        In a paused guest, wait first for the end of the pause.

        Args:
            opener: Opens the session on a connection.
            end: Ends a session that was opened although the caller was cancelled.
            on_turn: Called with true before the session is opened, and with false if the server
                refused the session, so that the caller waits again.

        Raises:
            ConnectionLostError: The guest does not answer.
        """
        self._openings += 1
        try:
            return await self._open(opener, end, on_turn)
        finally:
            self._openings -= 1

    async def _open(
        self,
        opener: Callable[[SSHClientConnection], Awaitable[T]],
        end: Callable[[T], Coroutine[None, None, None]],
        on_turn: Callable[[bool], None],
    ) -> T:
        tries = 0
        while True:
            await self.pauses.until_open()
            connection = await self._patiently_connected()
            from asyncssh import ChannelOpenError, Error  # the connection has imported it

            learned = await self._sessions.enter()
            on_turn(True)
            opening = asyncio.ensure_future(opener(connection))
            opening.add_done_callback(self._opened)
            try:
                return await asyncio.shield(opening)
            except asyncio.CancelledError:
                await self._wait_awhile(self._end_late(opening, end))
                raise
            except ChannelOpenError as error:
                others = self._sessions.refused(learned)
                on_turn(False)
                if connection.is_closed():
                    raise self.lost() from error
                if not others:  # the server may not know yet that the last session has ended
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
        """Release the place of a session that has ended; see `open()`."""
        self._used = time.monotonic()
        self._sessions.leave()

    async def end(self, ending: Coroutine[None, None, None]) -> None:
        """Run `ending`, which ends a session, and release the session's place.

        This waits even if the caller is cancelled, but at most 2 s: if the guest hangs, the
        session ends in the background.
        """
        end_in_child(ending)
        task = self.go_on(self._end(ending))
        task.add_done_callback(lambda _: ending.close())  # it may be cancelled before it begins
        await settle(asyncio.wait([task], timeout=ENDING))

    async def _wait_awhile(self, work: Coroutine[None, None, None]) -> None:
        await settle(asyncio.wait([self.go_on(work)], timeout=ENDING))

    def go_on(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run `work` in the background, until `close()` at the latest."""
        end_in_child(work)
        task = asyncio.ensure_future(work)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        return task

    async def _end(self, ending: Coroutine[None, None, None]) -> None:
        from asyncssh import Error

        try:
            # An error means that the connection is lost, so the session has ended, too.
            with suppress(ConnectionLostError, Error, OSError):
                await ending
        finally:
            self.release()

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
        """Open a session as soon as the guest runs, without waiting in the queue.

        If the server refuses the session on the shared connection, open a second connection.
        """
        connection, second = await self._patiently_connected(), None
        from asyncssh import ChannelOpenError, Error

        try:
            try:
                try:
                    opened = await opener(connection)
                except ChannelOpenError:
                    second = await self._log_in()
                    if second is None:
                        raise self.lost() from None
                    opened = await opener(second)
            except (Error, OSError) as error:
                raise self._lost(str(error)) from error
            yield opened
        finally:
            if second is not None:
                second.abort()

    @asynccontextmanager
    async def sftp(self) -> AsyncIterator[SFTPClient]:
        """Open an SFTP session for the block. File names that are not UTF-8 have surrogates."""
        client = await self.open(
            lambda connection: connection.start_sftp_client(path_errors="surrogateescape"), _exit
        )
        try:
            yield client
        finally:
            await self.end(_exit(client))

    @asynccontextmanager
    async def shared_sftp(self) -> AsyncIterator[SFTPClient]:
        """Use an SFTP session that all callers share, without waiting in the queue.

        The commands that take all places in the queue may wait for what the caller writes.
        """
        async with self._shared_turn:
            if self._shared is None:
                closing = AsyncExitStack()
                sftp = await closing.enter_async_context(
                    self.apart(lambda connection: connection.start_sftp_client())
                )
                closing.callback(sftp.exit)
                self._shared = _SharedSFTP(sftp, closing)
            shared = self._shared
            shared.users += 1
        try:
            yield shared.sftp
        except BaseException:
            self._drop_shared(shared)  # the session may be lost: others open a new one
            raise
        finally:
            shared.users -= 1
            if not shared.users:
                self._drop_shared(shared)
                await shared.closing.aclose()

    def _drop_shared(self, shared: _SharedSFTP) -> None:
        if self._shared is shared:
            self._shared = None

    async def _patiently_connected(self) -> SSHClientConnection:
        now = asyncio.get_running_loop().time
        began = now() - self._queued
        while (connection := await self._connected()) is None:
            if min(now() - self._queued - began, self.pauses.running_for()) > PATIENCE:
                raise self._lost(f"its SSH server has not answered for {PATIENCE:g} s")
            await asyncio.sleep(RETRY)
        return connection

    async def _connected(self) -> SSHClientConnection | None:
        """Return the connection; if there is none, make one attempt, shared by all callers."""
        if self._closed:
            raise self._lost("the VM has ended")
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        if self._connecting is None:
            self._connecting = asyncio.ensure_future(self._attempt())
            self._connecting.add_done_callback(self._attempted)
        attempt = self._connecting
        await asyncio.wait([attempt])
        return None if attempt.cancelled() else attempt.result()  # abort() has cancelled it

    def _attempted(self, attempt: asyncio.Task[Any]) -> None:
        self._connecting = None
        take_exception(attempt)

    async def _attempt(self) -> SSHClientConnection | None:
        connection = await self._log_in()
        if connection is not None:
            self._connection = connection
            if (key := connection.get_server_host_key()) is not None:
                self.host_key = key.export_public_key().decode().strip()
            self._keep_alive()
            self._sessions.forget_limit()
        return connection

    def _keep_alive(self) -> None:
        """Send keep-alives, unless the guest is paused and cannot answer."""
        if self._connection is not None and not self._connection.is_closed():
            self._connection.set_keepalive(0 if self.pauses.active else KEEPALIVE)

    async def _log_in(self) -> SSHClientConnection | None:
        """Open a new connection and log in; return `None` if no server answers yet."""
        await self.pauses.until_running()
        access = await self._access()
        if not self.serving:
            return await self._greet_and_log_in(access)
        self._greeting = LONGEST_GREETING  # a time-out would only start the greeting anew
        await import_asyncssh()
        began = time.monotonic()
        async with self._turn():
            self._queued += time.monotonic() - began
            return await self._greet_and_log_in(access)

    async def _greet_and_log_in(self, access: Access) -> SSHClientConnection | None:
        try:
            ours = await greeted(access.port, self._greeting)
        except TimeoutError:
            self._greeting = min(self._greeting * LONGER, LONGEST_GREETING)
            return None
        except OSError as error:  # the host has no descriptors
            raise self._lost(str(error)) from error
        self._greeting = GREETING
        if ours is None:
            return None
        try:
            async with self.pauses.timeout(LOGIN):
                return await log_in(ours, access, KEEPALIVE)
        except BaseException as error:
            ours.close()
            if isinstance(error, Exception):
                if self._final and (refusal := find_refusal(error, access)):
                    raise refusal from error
                reason = str(error) or f"the guest has not answered for {LOGIN:g} s"
                raise self._lost(f"logging in failed: {reason}") from error
            raise

    def _lost(self, reason: str) -> ConnectionLostError:
        message = f"{self._vm_id} cannot be reached over SSH: {reason}."
        error: ConnectionLostError = self.explain(ConnectionLostError(message))
        return error

    def lost(self) -> ConnectionLostError:
        """Return the error for a session that ended without an exit code or an answer."""
        return self._lost(
            "the connection was lost; the guest was reset or has ended, or its SSH server died"
        )


async def greeted(port: int, timeout: float) -> socket.socket | None:
    """Connect and wait for the server's first byte; return `None` if no server listens.

    Do not read the server's bytes: they stay in the socket.

    Raises:
        TimeoutError: The server sent nothing within `timeout` seconds.
    """
    loop = asyncio.get_running_loop()
    ours = socket.socket()
    private(ours.fileno())
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
