"""The real QEMU guest agent on this host, behind a socket that takes QEMU's port's place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from smolvm_async.controls.agent import linux
from smolvm_async.controls.agent.execution import AgentTransport, Execution
from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.agent.system import System
from smolvm_async.controls.commands.commands import Commands
from smolvm_async.controls.commands.lines import LineStream
from smolvm_async.controls.commands.processes import GuestProcess, Processes
from smolvm_async.controls.commands.result import Line
from smolvm_async.controls.commands.transport import Command, Transport
from smolvm_async.qemu.arguments import AGENT_PORT
from smolvm_async.qemu.events import Event, PortChanged
from smolvm_async.qemu.guest_agent import GuestAgent
from smolvm_async.qemu.pauses import Pauses

# The agent runs as the user of the tests, so it must not execute what would harm this host.
BLOCKED = (
    *("guest-shutdown", "guest-suspend-disk", "guest-suspend-ram", "guest-suspend-hybrid"),
    *("guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list", "guest-fsfreeze-thaw", "guest-fstrim"),
    *("guest-set-user-password", "guest-set-time", "guest-set-vcpus", "guest-set-memory-blocks"),
    *("guest-ssh-add-authorized-keys", "guest-ssh-remove-authorized-keys"),
)
STAND_IN = Path(__file__).parents[1] / "examples/stand_in"
SOON = 30.0  # seconds; the agent starts in 20 ms
DIALOGUE = 'read a; echo "got $a"; read b; echo "got $b" >&2; cat; exit 7'


def program() -> str:
    """Return the path of qemu-ga, which is not on every user's path."""
    path = shutil.which("qemu-ga", path=f"{os.environ['PATH']}:/usr/sbin:/usr/bin")
    assert path, "qemu-ga is missing: install the package qemu-guest-agent, as tests/run.sh does"
    return path


class Host:
    """A guest whose agent runs on this host.

    Attributes:
        channel: The channel to the agent.
        process: The agent's process.
        listeners: Called with the events of QEMU.
    """

    def __init__(self, directory: Path, programs: Path | None = None) -> None:
        self._path = os.environ["PATH"] if programs is None else f"{programs}:{os.environ['PATH']}"
        self.channel = GuestAgent(Pauses())
        self.listeners: list[Callable[[Event], None]] = [self.channel.on_event]
        self.process: asyncio.subprocess.Process
        self._directory = directory
        self._end: socket.socket
        self._state: str  # a directory in memory: the agent saves its state for each open file

    async def start(self) -> None:
        """Start an agent, which opens the port."""
        path = self._directory / "agent.sock"
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self.process = await asyncio.create_subprocess_exec(
            *(program(), "-m", "unix-listen", "-p", path, "-b", ",".join(BLOCKED)),
            *("-t", self._state, "-f", self._directory / "agent.pid"),
            cwd=self._directory,
            stderr=asyncio.subprocess.DEVNULL,
            env={"PATH": self._path, "LANG": "C.UTF-8"},
        )
        async with asyncio.timeout(SOON):
            while True:
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_unix_connection(path)
                    break
                await asyncio.sleep(0.01)
        self._pumps = [
            asyncio.ensure_future(self._to_agent(writer)),
            asyncio.ensure_future(self._to_host(reader)),
        ]
        self._changed(open=True)

    async def kill(self) -> None:
        """Kill the agent, which closes the port."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.wait(self._pumps)
        self._changed(open=False)

    def _changed(self, *, open: bool) -> None:
        event = PortChanged("VSERPORT_CHANGE", time.time(), {"id": AGENT_PORT, "open": open})
        for listener in self.listeners:
            listener(event)

    async def _to_agent(self, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await asyncio.get_running_loop().sock_recv(self._end, 65536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def _to_host(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            await asyncio.get_running_loop().sock_sendall(self._end, data)

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path, programs: Path | None = None) -> AsyncIterator[Host]:
        """Run an agent during the block. It finds programs first in the directory `programs`."""
        host = cls(directory, programs)
        program()
        host._end = host.channel.open()
        host._end.setblocking(False)
        try:
            with TemporaryDirectory(dir="/dev/shm") as host._state:
                await host.start()
                yield host
        finally:
            await host.kill()
            host._end.close()
            await host.channel.close()


class Guest(Commands, Processes):
    """A guest whose agent runs on this host."""

    def __init__(self, host: Host, system: System = linux) -> None:
        self.host = host
        self.session = Session(host.channel, Pauses())
        host.listeners.append(self.session.on_event)
        self.transport = AgentTransport(self.session, system)
        self._system = system

    async def _transport(self, feature: str) -> Transport:
        return self.transport

    @property
    def _shells(self) -> Sequence[str]:
        return ("raw", "login") if self._system is linux else ("raw", "cmd")

    def _require(self, feature: str) -> None:
        pass

    @asynccontextmanager
    async def executing(
        self, command: str, output: dict[str, bytearray] | None = None, **options: Any
    ) -> AsyncIterator[Execution]:
        kept = output if output is not None else {}
        given = Command(command, **{"shell": "raw", "env": {}, "content": b"", **options})

        def receive(stream: str, data: bytes) -> None:
            kept.setdefault(stream, bytearray()).extend(data)

        async with self.transport.executing(given, receive, lambda _: None) as execution:
            yield execution

    async def result(self, command: str, **options: Any) -> tuple[int | None, bytes, bytes]:
        output: dict[str, bytearray] = {}
        async with self.executing(command, output, **options) as execution:
            await asyncio.wait([execution.ended])
        if execution.error is not None:
            raise execution.error
        stdout, stderr = (bytes(output.get(name, b"")) for name in ("stdout", "stderr"))
        return execution.exit_code, stdout, stderr


def windows_programs(directory: Path) -> Path:
    """Make a directory with the stand-in's `powershell.exe` and the like, and return its path."""
    programs = directory / "programs"
    programs.mkdir()
    for name in ("powershell", "cmd", "taskkill"):
        shutil.copy(STAND_IN / "guest/windows.sh", programs / f"{name}.exe")
    shutil.copy(Path(linux.__file__).with_name("files.sh"), programs)
    (programs / "files.sh").chmod(0o755)
    return programs


def sleepers(seconds: str) -> list[int]:
    """Return the processes `sleep SECONDS`, in any state but dead."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


async def until_sleeping(seconds: str, count: int) -> None:
    async with asyncio.timeout(SOON):
        while len(sleepers(seconds)) != count:
            await asyncio.sleep(0.01)


async def first_of(lines: LineStream, count: int) -> AsyncIterator[Line]:
    """Yield the first lines."""
    for _ in range(count):
        yield await anext(lines)


async def check_dialogue(process: GuestProcess) -> None:
    """Check that a process that runs `DIALOGUE` gets its input part by part."""
    await process.write("one\n")
    assert await process.stdout.readline() == b"got one\n"
    await process.write("two\nrest")
    assert await process.stderr.readline() == b"got two\n"
    process.close_input()
    assert (await process.stdout.read(), await process.wait()) == (b"rest", 7)
