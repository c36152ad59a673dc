"""A fault at the awaits of commands and transfers through the agent: nothing is left.

QEMU's own agent runs on this host; for Windows, with the stand-in's `powershell.exe`. After each
fault, the next command has its own output and no other. Then there is no process and no file of a
command, no temporary file of a transfer, and no file that the agent has open.
SMOLVM_ASYNC_EVERY_FAULT=1 takes every await, otherwise chance some.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from functools import partial
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
from smolvm_async.errors import CommandTimeoutError, ConnectionLostError
from smolvm_async.qemu.arguments import AGENT_PORT
from smolvm_async.qemu.events import Event, PortChanged
from smolvm_async.qemu.guest_agent import GuestAgent
from smolvm_async.qemu.pauses import Pauses
from tests.agent import BLOCKED, Guest, Host, first_of, program, sleepers, windows_programs
from tests.conftest import BOOT, descriptors
from tests.faults.injection import Fault, Run, run_once
from tests.faults.test_every_await import EVERY, no_descriptors
from tests.integration.trees import digest_tree, make_tree

FEW = 8  # faults in each story, which has some 20 to 120 awaits
GONE = 10.0  # seconds for the cleanup in the guest
CONTENT = os.urandom(600_000)  # three requests to the agent, or more


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


class World(Files):
    """The guest of the stories, which is this host, and its directories."""

    def __init__(self, directory: Path, system: System = linux) -> None:
        self.source, self.target = directory / "source", directory / "target"
        self.commands = directory / "commands"
        for path in (self.target, self.commands):
            path.mkdir()
        make_tree(self.source / "tree", 8)
        (self.source / "big").write_bytes(CONTENT)
        programs = os.environ["PATH"]
        if system is windows:
            programs = f"{windows_programs(directory)}:{programs}"
        self.agent = Agent(directory, self.commands, programs)
        self._system = system
        self.guest: Guest
        self.telling: asyncio.Task[None]
        self.cancelled = False
        self.awaits: list[int] = []

    async def _files(self, feature: str) -> AbstractAsyncContextManager[GuestFiles]:
        return nullcontext(AgentFiles(self.guest.session, self.guest.transport))

    def _require(self, feature: str) -> None:
        pass

    def run(self, story: Story, fault: Fault, point: int) -> tuple[Run, list[str]]:
        """Run a story with a fault. Return all problems that were found."""
        self.cancelled = False
        channel = GuestAgent(Pauses())
        self.agent.listeners = [channel.on_event]
        host = SimpleNamespace(channel=channel, listeners=self.agent.listeners)
        self.agent.prepare()
        self.agent.connect(channel.open())
        run = run_once(partial(self._tell, story, cast(Host, host)), fault, point)
        self.agent.disconnect()
        return run, [*run.problems(), *self.left(story)]

    async def _tell(self, story: Story, host: Host) -> None:
        self.guest = Guest(host, self._system)
        self.telling = asyncio.ensure_future(story(self))
        await asyncio.wait([self.telling])
        try:
            assert self.telling.cancelled() == self.cancelled, f"{self.telling}"
            error = None if self.cancelled else self.telling.exception()
            assert await self.guest.result("echo again") == (0, b"again\n", b"")
            if error is not None:
                raise error
        finally:
            await self.guest.session.finish()
            await self.guest.session.close()
            await host.channel.close()

    def left(self, story: Story) -> list[str]:
        """Return all that is left in the guest; check and remove the copy of a transfer."""
        deadline = time.monotonic() + GONE
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(0.005)
        copy, name = self.target / "copy", "tree" if "tree" in story.__name__ else "big"
        if copy.exists() and content(copy) != content(self.source / name):
            found.append("a part of a copy")
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink(missing_ok=True)
        return found

    def _left(self) -> list[str]:
        files = [str(path) for path in self.commands.iterdir()]
        parts = [str(path) for path in self.target.iterdir() if path.name != "copy"]
        directories = tuple(map(str, (self.source, self.target, self.commands)))
        opened = descriptors(self.agent.process.pid).values()
        handles = [path for path in opened if path.startswith(directories)]
        return [*files, *parts, *handles, *map(str, sleepers(SECONDS))]


Story = Callable[[World], Coroutine[Any, Any, None]]
SECONDS = "1301"  # of a `sleep` that a story has to end


def content(path: Path) -> object:
    return digest_tree(path) if path.is_dir() else path.read_bytes()


async def command(world: World) -> None:
    script = "sha256sum; head -c 100000 /dev/zero >&2; exit 3"
    result = await world.guest.run(script, input=CONTENT, text=False)
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert (result.exit_code, result.stdout.split()[0]) == (3, digest.encode())
    assert result.stderr == bytes(100_000)


async def killed(world: World) -> None:
    tree = f"sleep {SECONDS} & (setsid sleep {SECONDS}; echo) & exec sleep {SECONDS}"
    with pytest.raises(CommandTimeoutError):
        await world.guest.run(tree, timeout=0.05)


async def stream(world: World) -> None:
    script = f"echo one; echo two; exec sleep {SECONDS}"
    async with world.guest.run_stream(script) as lines:
        assert [line.text async for line in first_of(lines, 2)] == ["one", "two"]


async def process(world: World) -> None:
    script = f"sleep {SECONDS} & read line; echo $line; head -c 100000; exec sleep {SECONDS}"
    async with await world.guest.spawn(script) as running:
        await running.write("one\n")
        assert await running.stdout.readline() == b"one\n"
        await running.write(CONTENT[:100_000])
        running.close_input()
        assert await running.stdout.readexactly(100_000) == CONTENT[:100_000]
        await running.terminate()
        assert await running.wait() == -signal.SIGTERM


async def upload(world: World) -> None:
    await world.upload_file(world.source / "big", f"{world.target}/copy")
    assert (world.target / "copy").exists()


async def upload_tree(world: World) -> None:
    await world.upload_file(world.source / "tree", f"{world.target}/copy")
    assert (world.target / "copy").exists()


async def download(world: World) -> None:
    await world.download_file(str(world.source / "big"), world.target / "copy")
    assert (world.target / "copy").exists()


async def download_tree(world: World) -> None:
    await world.download_file(str(world.source / "tree"), world.target / "copy")
    assert (world.target / "copy").exists()


STORIES: list[Story] = [
    command,
    killed,
    stream,
    process,
    upload,
    upload_tree,
    download,
    download_tree,
]


@pytest.fixture
def world(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    world = World(tmp_path, windows if request.param == "windows" else linux)
    monkeypatch.setattr(linux, "DIRECTORY", str(world.commands))
    yield world
    world.agent.end()


def cancel(world: World, gaps: Sequence[int] = ()) -> Fault:
    """Return a fault that cancels the story, and again after some suspensions."""

    def fault(run: Run) -> Generator[int, None, None]:
        for gap in (0, *gaps):
            if gap:
                yield gap
            if world.telling.cancel():
                run.struck = world.cancelled = True

    return fault


def replace(world: World) -> Fault:
    """Return a fault that replaces the agent by another one."""

    def fault(run: Run) -> Generator[int, None, None]:
        if not world.telling.done():
            run.struck = True
            world.agent.replace()
        yield from ()

    return fault


def count(world: World) -> Fault:
    """Return no fault: count the awaits of the story."""

    def fault(run: Run) -> Generator[int, None, None]:
        world.telling.add_done_callback(lambda _: world.awaits.append(run.count))
        yield from ()

    return fault


FAULTS: dict[str, Callable[[World], Fault]] = {
    "cancel": cancel,
    "cancel, and 1 await later": partial(cancel, gaps=[1]),
    "cancel, and 2 and 5 awaits later": partial(cancel, gaps=[2, 3]),
    "another agent": replace,
    "EMFILE for 5 awaits": lambda _: no_descriptors(5),
}


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
    run, problems = world.run(story, count(world), 1)
    assert not problems
    assert run.error is None
    every = [(fault, point) for fault in FAULTS for point in range(2, world.awaits[0])]
    sites: set[str] = set()
    for fault, point in every if EVERY else random.sample(every, FEW):
        run, problems = world.run(story, FAULTS[fault](world), point)
        assert not problems, f"{fault} at await {point} ({run.site}), {run.error!r}: {problems}"
        sites.update(run.site.split())
        if run.struck:
            record_property("injected", (f"{fault}, in {story.__name__}() through the agent", 1))
    record_property("injected at", sorted(sites))


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
