"""One command in the guest, through its agent: start, output, exit code, and how to kill it.

The agent can capture a command's output, but then a command has not ended for it before all
children of the command have closed the output; it keeps 16 MiB, and tells nothing before the end.
So the output goes to files in the guest that only their owner can read. They are read while the
command runs, and removed after its end.

The agent tells the end of a command once, and forgets the command then.
"""

from __future__ import annotations

import asyncio
import secrets
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from smolvm_async.controls.agent import linux
from smolvm_async.controls.agent.files import GuestFile, field, open_file
from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.commands.transport import Command, Stream
from smolvm_async.controls.commands.transport import Execution as AnyExecution
from smolvm_async.errors import ConfigError, ConnectionLostError, GuestAgentError, SmolVMError
from smolvm_async.foundation.tasks import end_tasks
from smolvm_async.qemu.guest_agent import GuestAgent

FIRST = 0.001  # seconds until the first look at a command, and at least between two looks
LAST = 0.1  # seconds between two looks at a command that runs for long
SHARE = 0.1  # of the time that the command has run: the time until the next look
EARLY = 0.05  # seconds after which the output is read while the command runs
SOME = 1 << 20  # bytes of output to read between two looks at a command
MAX_PROGRAM = 1 << 20  # bytes: one request to the agent has all of them

SUFFIXES: dict[Stream, str] = {"stdout": "out", "stderr": "err"}


async def start(agent: GuestAgent, mark: str, program: str) -> int:
    """Start a shell with a program, and return its process id."""
    content = program.encode(errors="surrogateescape")
    if len(content) > MAX_PROGRAM:
        raise ConfigError("command= has more than 1 MiB: upload it as a file, and run the file.")
    return await execute(
        agent, linux.SHELL, linux.arguments(mark), **{"input-data": b64encode(content).decode()}
    )


async def execute(agent: GuestAgent, path: str, arguments: list[str], **more: object) -> int:
    """Start a program in the guest, and return its process id."""
    request = {"path": path, "arg": arguments, **more}
    return field(await agent.execute("guest-exec", request), "pid", int, "guest-exec")


async def look(agent: GuestAgent, pid: int) -> int | None:
    """Return the exit code of a program, negative for a signal; `None` while it runs.

    The agent tells the exit code only once.
    """
    command = "guest-exec-status"
    status = await agent.execute(command, {"pid": pid})
    if not field(status, "exited", bool, command):
        return None
    if isinstance(status, dict) and "signal" in status:
        return -field(status, "signal", int, command)
    return field(status, "exitcode", int, command)


async def wait(agent: GuestAgent, pid: int) -> int:
    """Wait for the end of a program, and return its exit code."""
    began = asyncio.get_running_loop().time()
    while (code := await look(agent, pid)) is None:  # noqa: ASYNC110  # the agent tells no end
        await asyncio.sleep(until_next_look(began))
    return code


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
        self, session: Session, stem: str, receive: Callable[[Stream, bytes], None]
    ) -> None:
        self.exit_code: int | None = None
        self.error: SmolVMError | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._session = session
        self._stem = stem
        self._receive = receive
        self._running: asyncio.Task[None] | None = None
        self._files: dict[Stream, GuestFile] = {}
        self._reading = asyncio.Event()
        self._reading.set()

    async def write(self) -> None:
        """Do nothing: `run()` has written the input before the command starts."""

    def pause_reading(self) -> None:
        """Stop reading output: it waits in the guest's files."""
        self._reading.clear()

    def resume_reading(self) -> None:
        """Continue to read."""
        self._reading.set()

    async def run(self, mark: str, program: str, content: bytes) -> None:
        """Run the command to its end; keep its exit code or the error."""
        self._running = asyncio.current_task()
        self._session.watchers.add(self._lose)
        try:
            if content:
                await self._write_input(mark, content)
            pid = await start(self._session.agent, mark, program)
            self.exit_code = await self._follow(pid)
        except SmolVMError as error:
            self.error = error
        finally:
            self._session.watchers.discard(self._lose)
            self.ended.set_result(None)

    def _lose(self) -> None:
        """Give up: no later agent knows this command."""
        message = "the guest agent ended, or the guest was reset, while the command ran"
        self.error = self.error or ConnectionLostError(message)
        assert self._running is not None
        self._running.cancel()

    async def _write_input(self, mark: str, content: bytes) -> None:
        path = f"{self._stem}.in"
        await wait(
            self._session.agent, await start(self._session.agent, mark, linux.make_file(path))
        )
        async with open_file(self._session, path, "r+") as file:
            await file.write(content)

    async def _follow(self, pid: int) -> int:
        """Pass on the command's output until its end; return the exit code."""
        loop = asyncio.get_running_loop()
        began, code = loop.time(), None
        async with AsyncExitStack() as stack:
            while code is None:
                await asyncio.sleep(until_next_look(began))
                code = await look(self._session.agent, pid)
                if code is not None or loop.time() - began > EARLY:
                    await self._read(stack, last=code is not None)
        return code

    async def _read(self, stack: AsyncExitStack, *, last: bool) -> None:
        """Pass on the new output."""
        for stream, suffix in SUFFIXES.items():
            if stream not in self._files:
                try:
                    opening = open_file(self._session, f"{self._stem}.{suffix}", "r")
                    self._files[stream] = await stack.enter_async_context(opening)
                except GuestAgentError as error:
                    if not last:
                        return  # the shell has not made it yet
                    hint = f"Is the disk of the guest full, or {linux.DIRECTORY} read-only?"
                    message = f"the guest did not keep the command's output: {error.message}"
                    raise ConnectionLostError(message, hint=hint) from error
            await self._read_file(stream, self._files[stream], last=last)

    async def _read_file(self, stream: Stream, file: GuestFile, *, last: bool) -> None:
        """Pass on a part of a file, or at last the rest that is there: some programs never stop."""
        rest: int | None = None  # bytes
        while rest is None or rest > 0:
            await self._reading.wait()
            data, is_end = await file.read()
            if data:
                self._receive(stream, data)
            if is_end:
                return
            if rest is not None:
                rest -= len(data)
            elif last:
                position = await file.seek(0, "cur")
                rest = await file.seek(0, "end") - position
                await file.seek(position, "set")
            else:
                rest = SOME


class AgentTransport:
    """The way to run commands in a Linux guest through its agent: a `Transport`.

    A slow reader does not slow down a command: the output waits in the guest's files. A command
    runs as the agent does, usually as root.
    """

    def __init__(self, session: Session) -> None:
        self.pauses = session.pauses
        self.explain = session.explain
        self._session = session

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
        """Run a command during the block; kill the command if it still runs at the block's end.

        Args:
            command: The command.
            receive: Called with all output.
            on_turn: Called at once: a command waits for no other.
        """
        mark, name = secrets.token_hex(8), secrets.token_hex(16)
        stem = f"{linux.DIRECTORY}/smolvm-{name}"
        text, shell, env, content = command
        program = linux.program(text, shell, env, mark, stem, has_input=bool(content))
        on_turn(True)
        execution = Execution(self._session, stem, receive)
        running = asyncio.ensure_future(execution.run(mark, program, content))
        try:
            yield execution
        finally:
            if execution.exit_code is None:
                await self._session.end(self._kill(running, mark))
            files = [f"{stem}.{suffix}" for suffix in ("in", *SUFFIXES.values())]
            self._session.remove(files, self._remove)

    async def _kill(self, running: asyncio.Task[None], mark: str) -> None:
        """Kill a command, which may be starting: the agent executes requests in their order."""
        await end_tasks(running)
        agent = self._session.agent
        # The killer must not have the mark, or it would kill itself.
        await wait(agent, await start(agent, secrets.token_hex(8), linux.killer(mark)))

    async def _remove(self, paths: list[str]) -> None:
        agent = self._session.agent
        await wait(agent, await execute(agent, linux.REMOVER, ["-f", *paths]))
