"""A fault at the awaits of commands and transfers through the agent: nothing is left.

QEMU's own agent runs on this host; for Windows, with the stand-in's `powershell.exe`. After each
fault, the next command has its own output and no other. Then there is no process and no file of a
command, no temporary file of a transfer, and no file that the agent has open.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import select
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import pytest

from smolvm_async import AsyncSmolVM
from smolvm_async.controls.agent import linux, windows
from smolvm_async.controls.agent.system import System
from smolvm_async.controls.agent.transfer import AgentFiles
from smolvm_async.controls.files.files import Files
from smolvm_async.controls.files.transport import GuestFiles
from smolvm_async.errors import ConnectionLostError
from smolvm_async.qemu.arguments import AGENT_PORT
from smolvm_async.qemu.events import Event, PortChanged
from smolvm_async.qemu.guest_agent import GuestAgent
from smolvm_async.qemu.pauses import Pauses
from tests.agent import BLOCKED, Guest, Host, program, windows_programs
from tests.conftest import BOOT, descriptors
from tests.faults.commands import (
    CONTENT,
    GONE,
    SECONDS,
    STORIES,
    Story,
    World,
    check_faults,
    command,
    killed,
    stream,
)

FEW = 8  # faults in each story, which has some 20 to 120 awaits


class Agent:
    """QEMU's agent on this host, behind a port of QEMU: the port stays when the agent ends.

    A thread carries the bytes, so that the event loop has no awaits of this.
    """

    def __init__(self, directory: Path, work: Path, path: str) -> None:
        self.listeners: list[Callable[[Event], None]] = []
        self._directory, self._work, self._path = directory, work, path
        self._state = TemporaryDirectory(dir="/dev/shm")
        self._port: socket.socket | None = None
        self._spares: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        self._numbers = itertools.count()
        self.prepare()
        self.process, self._link = self._spares.pop()

    def prepare(self) -> None:
        """Start another agent, for `replace()`: a fault starts no process."""
        if self._spares:
            return
        path = self._directory / f"agent{next(self._numbers)}"
        process = subprocess.Popen(
            [
                *(program(), "-m", "unix-listen", "-p", path, "-b", ",".join(BLOCKED)),
                *("-t", self._state.name, "-f", f"{path}.pid"),
            ],
            cwd=self._work,
            stderr=subprocess.DEVNULL,
            env={"PATH": self._path, "LANG": "C.UTF-8"},
        )
        deadline = time.monotonic() + GONE
        link = socket.socket(socket.AF_UNIX)
        while link.connect_ex(str(path)):
            assert time.monotonic() < deadline, "the agent does not start"
            time.sleep(0.005)
        self._spares.append((process, link))

    def connect(self, port: socket.socket) -> None:
        """Let the agent open a port of QEMU."""
        self._port = port
        self._carrying = threading.Thread(target=self._carry, args=(port, self._link))
        self._carrying.start()
        self._tell(open=True)

    @staticmethod
    def _carry(port: socket.socket, link: socket.socket) -> None:
        with suppress(OSError, ValueError):  # a socket is closed, such as a killed agent's
            while True:
                for source in select.select([port, link], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    (link if source is port else port).sendall(data)

    def disconnect(self) -> None:
        """Close the port, whose other end is closed."""
        assert self._port is not None
        self._carrying.join()
        self._port.close()

    def replace(self) -> None:
        """Kill the agent, which loses all that it has not answered; another one opens the port."""
        assert self._port is not None
        self._kill()
        self._carrying.join()
        self._tell(open=False)
        self.process, self._link = self._spares.pop()
        self.connect(self._port)

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()

    def end(self) -> None:
        self._kill()
        while self._spares:
            self.process, self._link = self._spares.pop()
            self._kill()
        self._state.cleanup()

    def _tell(self, *, open: bool) -> None:
        event = PortChanged("VSERPORT_CHANGE", time.time(), {"id": AGENT_PORT, "open": open})
        for listener in self.listeners:
            listener(event)


class InAgent(Guest, Files):
    """A guest whose agent runs on this host, with its files."""

    async def _files(self, feature: str) -> AbstractAsyncContextManager[GuestFiles]:
        return nullcontext(AgentFiles(self.session, self.transport))


class AgentWorld(World):
    """A guest behind its agent."""

    guest: InAgent

    def __init__(self, directory: Path, system: System = linux) -> None:
        super().__init__(directory)
        self.commands = directory / "commands"
        self.commands.mkdir()
        programs = os.environ["PATH"]
        if system is windows:
            programs = f"{windows_programs(directory)}:{programs}"
        self.agent = Agent(directory, self.commands, programs)
        self._system = system

    @contextmanager
    def plugged(self) -> Iterator[None]:
        self._channel = GuestAgent(Pauses())
        self.agent.listeners = [self._channel.on_event]
        self.agent.prepare()
        self.agent.connect(self._channel.open())
        try:
            yield
        finally:
            self.agent.disconnect()

    @asynccontextmanager
    async def reached(self) -> AsyncIterator[None]:
        host = SimpleNamespace(channel=self._channel, listeners=self.agent.listeners)
        self.guest = InAgent(cast(Host, host), self._system)
        try:
            yield
        finally:
            await self.guest.session.finish()
            await self.guest.session.close()
            await self._channel.close()

    def lose(self) -> None:
        self.agent.replace()

    def leftovers(self) -> list[str]:
        files = [str(path) for path in self.commands.iterdir()]
        directories = tuple(map(str, (self.source, self.target, self.commands)))
        opened = descriptors(self.agent.process.pid).values()
        return [*files, *(path for path in opened if path.startswith(directories))]


@pytest.fixture
def world(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AgentWorld]:
    world = AgentWorld(tmp_path, windows if request.param == "windows" else linux)
    monkeypatch.setattr(linux, "DIRECTORY", str(world.commands))
    yield world
    world.agent.end()


@pytest.mark.parametrize(
    ("world", "story"),
    [
        *[("linux", story) for story in STORIES],
        *[("windows", story) for story in (command, killed, stream)],
    ],
    indirect=["world"],
)
def test_a_fault_leaves_nothing_in_the_guest(
    world: World, story: Story, record_property: Callable[[str, object], None]
) -> None:
    check_faults(world, story, FEW, record_property)


# The guest's agent, started again as it was started before, as soon as it has ended.
AGAIN = """
agent=$(pidof qemu-ga)
set -- $(tr '\\0' ' ' </proc/$agent/cmdline)
(while kill -0 $agent; do sleep 0.1; done; exec "$@") </dev/null >/dev/null 2>&1 &
"""
# All that is left of other commands than this one.
LEFT = f"""
own=$(basename "$(readlink /proc/$$/fd/1)" .out)
{{ ls -A /tmp; ls -l /proc/$(pidof qemu-ga)/fd | grep /tmp/; }} | grep -v "$own"
grep -ls '[{SECONDS[0]}]{SECONDS[1:]}' /proc/[0-9]*/cmdline
"""


@pytest.mark.anyio
async def test_a_real_guest_is_clean_after_cancellations_and_an_agent_that_was_killed(
    stand_in: Path, tmp_path: Path, data_dir: Path
) -> None:
    options: dict[str, Any] = {"os": "linux", "channel": "agent", "accel": "tcg"}
    (tmp_path / "big").write_bytes(CONTENT)
    async with AsyncSmolVM(image=stand_in, data_dir=data_dir, memory=1024, **options) as vm:

        async def lines() -> None:
            async with vm.run_stream(f"echo one; exec sleep {SECONDS}") as stream:
                assert (await anext(stream)).text == "one"
                await anext(stream)

        for make in (
            lambda: vm.run(f"sleep {SECONDS} & exec sleep {SECONDS}", None, input=CONTENT),
            lines,
            lambda: vm.upload_file(tmp_path / "big", "/tmp/copy"),
            lambda: vm.download_file("/bin/busybox", tmp_path / "copy"),
        ):
            call = asyncio.ensure_future(cast(Coroutine[Any, Any, Any], make()))
            await asyncio.wait([call], timeout=random.random() / 2)
            call.cancel()
            await asyncio.wait([call])
            assert (await vm.run("echo again; rm -f /tmp/copy", BOOT)).stdout == "again\n"
        await vm.run(AGAIN, BOOT, check=True)
        with pytest.raises(ConnectionLostError, match="the guest agent ended"):
            await vm.run(f"kill -KILL $(pidof qemu-ga); exec sleep {SECONDS}", None)
        async with asyncio.timeout(BOOT):
            while (await vm.run(LEFT, BOOT)).stdout:
                await asyncio.sleep(0.1)
        await vm.stop(timeout=0)
