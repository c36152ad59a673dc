"""One command in the guest, through its agent: start, output, exit code, and how to kill it.

The agent can capture a command's output, but then a command has not ended for it before all
children of the command have closed the output; it keeps 16 MiB, and tells nothing before the end.
So the output goes to files in the guest that only their owner can read. They are read while the
command runs, and removed after its end.

The agent tells the end of a command once, and forgets the command then.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from smolvm_async.controls.agent import linux
from smolvm_async.controls.agent.files import field, open_files
from smolvm_async.controls.agent.output import Output
from smolvm_async.controls.agent.session import ENDING, Session
from smolvm_async.controls.agent.system import Program, System
from smolvm_async.controls.commands.transport import Command, Stream
from smolvm_async.controls.commands.transport import Execution as AnyExecution
from smolvm_async.errors import (
    ConfigError,
    ConnectionLostError,
    GuestAgentError,
    SmolVMError,
    UnsupportedError,
    VMNotRunningError,
    VMTimeoutError,
)
from smolvm_async.foundation.tasks import end_tasks, has_result, take_exception
from smolvm_async.qemu.events import Event, Reset
from smolvm_async.qemu.guest_agent import GuestAgent, result_of

FIRST = 0.001  # seconds between two looks, at least
LAST = 0.1  # seconds between two looks at a command that runs for long
SHARE = 0.1  # of the time that the command has run: the time until the next look
# A look takes the processor of a guest that has one, and a short command takes about as long to run
# as to start. So the first look waits: at 0.3 and at 0.75, `true` takes a tenth longer under TCG.
START = 0.5  # of the time that the start took: the time until the first look
UNHURRIED = 0.01  # seconds until the first look at most: other requests may have delayed the start
EARLY = 0.05  # seconds after which the output is read while the command runs
ATTEMPTS = 3  # at most, to kill a command or to remove its files
STATUS = "guest-exec-status"
MAX_PROGRAM = 1 << 20  # bytes: one request to the agent has all of them


def find_system(os: str) -> System:
    """Return what differs for a guest OS."""
    if os == "windows":
        from smolvm_async.controls.agent import windows

        return windows
    return linux


async def launch(agent: GuestAgent, program: Program) -> int:
    """Start a program in the guest, and return its process id."""
    if len(program.content) > MAX_PROGRAM:
        raise ConfigError("command= has more than 1 MiB: upload it as a file, and run the file.")
    more = {"input-data": b64encode(program.content).decode()} if program.content else {}
    return await execute(agent, program.path, [*program.arguments], **more)


async def execute(agent: GuestAgent, path: str, arguments: list[str], **more: object) -> int:
    """Start a program in the guest, and return its process id.

    Raises:
        UnsupportedError: The agent's configuration does not allow it, as in images of RHEL.
    """
    command, request = "guest-exec", {"path": path, "arg": arguments, **more}
    try:
        return field(await agent.execute(command, request), "pid", int, command)
    except GuestAgentError as error:
        if error.error_class != "CommandNotFound":
            raise
        message = "the guest agent in the image does not allow guest-exec, which commands need."
        hint = "Allow guest-exec and the guest-file-* commands in its configuration in the guest, "
        hint += "/etc/sysconfig/qemu-ga or /etc/qemu/qemu-ga.conf."
        raise UnsupportedError(message, hint=hint) from error


async def look(agent: GuestAgent, pid: int, system: System = linux) -> int | None:
    """Return the exit code of a program; `None` while it runs.

    The agent tells the exit code only once.
    """
    return _exit_code(await agent.execute(STATUS, {"pid": pid}), system)


def _exit_code(status: object, system: System) -> int | None:
    if not field(status, "exited", bool, STATUS):
        return None
    if isinstance(status, dict) and "signal" in status:
        return system.exit_code(field(status, "signal", int, STATUS), signal=True)
    return system.exit_code(field(status, "exitcode", int, STATUS), signal=False)


async def wait(agent: GuestAgent, pid: int) -> int:
    """Wait for the end of a program, and return its exit code."""
    began = asyncio.get_running_loop().time()
    while (code := await look(agent, pid)) is None:  # noqa: ASYNC110  # the agent tells no end
        await asyncio.sleep(until_next_look(began))
    return code


async def complete(agent: GuestAgent, program: Program) -> None:
    """Run a program to its end. Start it again if its agent ends meanwhile."""
    for attempt in range(ATTEMPTS):
        try:
            await wait(agent, await launch(agent, program))
            return
        except (ConnectionLostError, GuestAgentError):
            if attempt + 1 == ATTEMPTS:
                raise


def until_next_look(began: float) -> float:
    """Return the seconds until the next look at a program that has run since `began`."""
    elapsed = asyncio.get_running_loop().time() - began
    return min(max(FIRST, elapsed * SHARE), LAST)


class Execution:
    """A running command.

    Attributes:
        exit_code: The exit code as in `subprocess`: negative for a signal; `None` while the command
            runs, or if there is an `error`.
        error: The reason if the command's end is not known.
        ended: Done when the command has ended and its output is read, or with the error.
    """

    def __init__(
        self,
        session: Session,
        system: System,
        receive: Callable[[Stream, bytes], None],
    ) -> None:
        self.exit_code: int | None = None
        self.error: SmolVMError | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._session = session
        self._system = system
        self._mark = secrets.token_hex(8)
        self._stem = system.stem(secrets.token_hex(16))
        self._output = Output(session, system, self._stem, receive)
        self._input = 0  # bytes of the command's input files
        self._making: asyncio.Future[int] | None = None
        self._starting: asyncio.Future[int] | None = None
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._feeding = asyncio.Lock()
        self._detached = False
        self._gone = False
        self._running: asyncio.Task[None]

    async def write(self) -> None:
        """Do nothing: `run()` has written the input before the command starts."""

    async def feed(self, content: bytes) -> None:
        """Write a part of the standard input into a file of the guest: no command slows it down."""
        try:
            await self._append("in", content, live=True)
        except SmolVMError:
            if not self.ended.done():
                raise

    def end_input(self) -> None:
        """End the standard input after all parts, in the background."""
        self._session.go_on(self._append("end", b".", live=True))

    async def _append(self, name: str, content: bytes, *, live: bool) -> None:
        """Write into one of the command's files, and announce it if the command may wait for it."""
        async with self._feeding:
            if self.ended.done() or self._detached:
                return
            self._input += len(content)
            names = (name, "bell") if live and self._system.HAS_BELL else (name,)
            paths = [self._system.file(self._stem, each) for each in names]
            async with open_files(self._session, paths, "r+") as (file, *bells):
                await file.seek(0, "end")
                await file.write(content)
                await file.flush()
                for bell in bells:
                    await bell.write(b"\n")

    async def send_signal(self, name: str) -> None:
        """Send a signal to the processes of the command: see `Execution.send_signal()`."""
        assert self._starting is not None
        agent, pid = self._session.agent, 0
        # If only the agent's answer was lost, the command runs: Linux finds it by its mark.
        with contextlib.suppress(ConnectionLostError, GuestAgentError, VMTimeoutError):
            pid = await self._starting
        program = self._system.signaller(self._mark, pid, name)
        self._output.may_be_missing = True
        await complete(agent, program)
        if self._detached:  # who was killed removes nothing
            self._session.remove(self._stem, 0, self._remove)

    def pause_reading(self) -> None:
        """Stop reading output: it waits in the guest's files."""
        self._output.pause()

    def resume_reading(self) -> None:
        """Continue to read."""
        self._output.resume()

    def begin(self, command: Command) -> None:
        """Run the command to its end; keep its exit code or the error."""
        self._detached = command.detached
        content = command.content or b""
        large = len(content) > self._system.MAX_CONTENT
        kept = command._replace(content=b"") if large else command
        runner = self._system.runner(kept, self._mark, self._stem, has_input=large)
        to_file = large or (command.content is None and not command.detached)
        self._running = asyncio.ensure_future(self._run(runner, content if to_file else None))

    async def until_started(self) -> None:
        """Wait until the command has started, or raise the error if it could not be."""
        either = [self._started, self.ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self.error is not None:
            raise self.error

    async def _run(self, runner: Program, content: bytes | None) -> None:
        self._session.watchers.add(self._lose)
        try:
            if content is not None:
                await self._make_input(content)
            # A cancelled call must not lose the id, by which the command is killed.
            self._starting = asyncio.ensure_future(launch(self._session.agent, runner))
            self._starting.add_done_callback(take_exception)
            began = asyncio.get_running_loop().time()
            pid = await asyncio.shield(self._starting)
            self._started.set_result(None)
            took = asyncio.get_running_loop().time() - began
            await asyncio.sleep(min(took * START, UNHURRIED))
            self.exit_code = await self._follow(pid)
        except SmolVMError as error:
            self.error = error
        finally:
            self._session.watchers.discard(self._lose)
            self.ended.set_result(None)

    def _lose(self, event: Event | None) -> None:
        """Give up: no later agent knows this command, and no command survives a reset."""
        self._gone = event is None or isinstance(event, Reset)
        ended = "QEMU has ended, or this process has detached, while the command ran"
        reset = "the guest agent ended, or the guest was reset, while the command ran"
        self.error = self.error or (
            VMNotRunningError(ended) if event is None else ConnectionLostError(reset)
        )
        self._running.cancel()

    async def _make_input(self, content: bytes) -> None:
        self._making = asyncio.ensure_future(self._make_files(live=not content))
        self._making.add_done_callback(take_exception)
        await asyncio.shield(self._making)  # files that come after their removal would stay
        if content:
            await self._append("in", content, live=False)

    async def _make_files(self, *, live: bool) -> int:
        agent = self._session.agent
        maker = self._system.maker(self._stem, self._mark, live=live)
        return await wait(agent, await launch(agent, maker))

    async def _follow(self, pid: int) -> int:
        """Pass on the command's output until its end; return the exit code."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with AsyncExitStack() as stack:
            # Most commands have ended at the first look, which opens their output, too.
            opening = stack if self._system.KEEPS_OPEN and not self._detached else None
            while (code := await self._look(pid, opening)) is None:
                opening = None
                if not self._detached and loop.time() - began > EARLY:
                    await self._output.read(stack, last=False)
                await asyncio.sleep(until_next_look(began))
            if not self._detached:
                await self._output.read(stack, last=True)
        return code

    async def _look(self, pid: int, stack: AsyncExitStack | None) -> int | None:
        """Return the exit code, if the command has ended; with a stack, open its output, too."""
        try:
            if stack is None:
                return await look(self._session.agent, pid, self._system)
            reply = await self._output.open_after(stack, (STATUS, {"pid": pid}))
            return _exit_code(result_of(STATUS, reply), self._system)
        except GuestAgentError as error:
            if not error.error_class:
                raise
            message = "the guest agent has started again, and does not know the command"
            raise ConnectionLostError(message) from error

    async def end(self) -> None:
        """Kill the command if it still runs, unless it is detached, and remove its files."""
        if self._detached and self._started.done():  # it has no files, or removes them itself
            await end_tasks(self._running)
            return
        if self._gone or self.exit_code is not None:
            try:
                await end_tasks(self._running)
            finally:
                self._discard()
        else:
            await self._session.end(self._kill())

    async def _kill(self) -> None:
        """Kill the command, which may be starting, and remove its files."""
        await end_tasks(self._running)
        with contextlib.suppress(SmolVMError):  # the agent has ended, or the guest
            if self._starting is not None:
                await self.send_signal("KILL")
                await self._forget()
            elif self._making is not None:
                await self._until_made()
        self._discard()

    async def _forget(self) -> None:
        """Take the exit code of the killed command.

        The agent keeps it otherwise, and tells it of a later process that has the same id.
        """
        assert self._starting is not None
        if has_result(self._starting):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ENDING):
                    await wait(self._session.agent, self._starting.result())

    async def _until_made(self) -> None:
        """Wait until the program that makes the input files can make no more files."""
        assert self._making is not None
        try:
            await self._making
        except SmolVMError:  # its agent has ended, and the program may go on
            await complete(self._session.agent, self._system.signaller(self._mark, 0, "KILL"))

    def _discard(self) -> None:
        self._session.remove(self._stem, self._input + self._output.size, self._remove)

    async def _remove(self, stems: list[str]) -> None:
        await complete(self._session.agent, self._system.remover(stems))


class AgentTransport:
    """The way to run commands in a guest through its agent: a `Transport`.

    A slow reader does not slow down a command: the output waits in the guest's files. A command
    runs as the agent does: usually as root, or as LocalSystem.
    """

    def __init__(self, session: Session, system: System = linux) -> None:
        self.pauses = session.pauses
        self.explain = session.explain
        self._session = session
        self._system = system

    def lost(self, execution: AnyExecution) -> SmolVMError:
        """Return the error for a command whose exit code is not known."""
        error = execution.error if isinstance(execution, Execution) else None
        return error or ConnectionLostError("the guest agent lost the command")

    @asynccontextmanager
    async def executing(
        self,
        command: Command,
        receive: Callable[[Stream, bytes], None],
        on_turn: Callable[[bool], None],
    ) -> AsyncIterator[Execution]:
        """Run a command during the block: see `Transport.executing()`."""
        execution = Execution(self._session, self._system, receive)
        on_turn(True)  # a command waits for no other
        execution.begin(command)
        try:
            if command.content is None:
                await execution.until_started()
            yield execution
        finally:
            await execution.end()
