"""Commands and transfers in a guest that is this host, and faults at their awaits.

`test_agent.py` reaches the guest through its agent, `test_windows_ssh.py` through its SSH server.
SMOLVM_ASYNC_EVERY_FAULT=1 takes every await, otherwise chance some.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from smolvm_async.errors import CommandTimeoutError
from tests.agent import first_of, sleepers
from tests.faults.injection import Fault, Run, run_once
from tests.faults.test_every_await import EVERY, no_descriptors
from tests.integration.trees import digest_tree, make_tree

GONE = 30.0  # seconds for the cleanup in the guest, at most
CONTENT = os.urandom(600_000)  # three requests to the agent, or more


class World:
    """The guest of the stories, and the directories of both sides.

    Attributes:
        guest: The guest, as a user has it: with `run()`, `upload_file()` and so on.
    """

    guest: Any

    def __init__(self, directory: Path) -> None:
        self.source, self.target = directory / "source", directory / "target"
        self.target.mkdir()
        make_tree(self.source / "tree", 8)
        (self.source / "big").write_bytes(CONTENT)
        self.telling: asyncio.Task[None]
        self.cancelled = False
        self.awaits: list[int] = []

    def at(self, path: Path) -> str:
        """Return the guest's path of a file in one of the directories."""
        return str(path)

    def content(self, path: Path) -> object:
        """Return all of a file or a directory that a transfer keeps."""
        return digest_tree(path) if path.is_dir() else path.read_bytes()

    def plugged(self) -> AbstractContextManager[object]:
        """Do what the guest needs around the event loop of a story."""
        return nullcontext()

    def reached(self) -> AbstractAsyncContextManager[object]:
        """Set `guest` for a block."""
        raise NotImplementedError

    def lose(self) -> None:
        """Lose the connection to the guest, or its agent; the next attempt finds a new one."""
        raise NotImplementedError

    def leftovers(self) -> list[str]:
        """Return the files and processes in the guest that nobody needs any more."""
        raise NotImplementedError

    def run(self, story: Story, fault: Fault, point: int) -> tuple[Run, list[str]]:
        """Run a story with a fault. Return all problems that were found."""
        self.cancelled = False
        with self.plugged():
            run = run_once(partial(self._tell, story), fault, point)
        return run, [*run.problems(), *self.left(story)]

    async def _tell(self, story: Story) -> None:
        async with self.reached():
            self.telling = asyncio.ensure_future(story(self))
            await asyncio.wait([self.telling])
            assert self.telling.cancelled() == self.cancelled, f"{self.telling}"
            error = None if self.cancelled else self.telling.exception()
            result = await self.guest.run("echo again")
            again = (result.exit_code, result.stdout, result.stderr)
            assert again == (0, "again\n", ""), f"{again}"
            if error is not None:
                raise error

    def left(self, story: Story) -> list[str]:
        """Return all that is left in the guest; check and remove the copy of a transfer."""
        deadline = time.monotonic() + GONE
        while (found := self.all_left()) and time.monotonic() < deadline:
            time.sleep(0.005)
        copy, name = self.target / "copy", "tree" if "tree" in story.__name__ else "big"
        if copy.exists() and self.content(copy) != self.content(self.source / name):
            found.append("a part of a copy")
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink(missing_ok=True)
        return found

    def all_left(self) -> list[str]:
        parts = [str(path) for path in self.target.iterdir() if path.name != "copy"]
        return [*parts, *self.leftovers(), *map(str, sleepers(SECONDS))]


Story = Callable[[World], Coroutine[Any, Any, None]]
SECONDS = f"1301{os.getpid()}"  # of a `sleep` that a story has to end; tests run in parallel


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
    await world.guest.upload_file(world.source / "big", world.at(world.target / "copy"))
    assert (world.target / "copy").exists()


async def upload_tree(world: World) -> None:
    await world.guest.upload_file(world.source / "tree", world.at(world.target / "copy"))
    assert (world.target / "copy").exists()


async def download(world: World) -> None:
    await world.guest.download_file(world.at(world.source / "big"), world.target / "copy")
    assert (world.target / "copy").exists()


async def download_tree(world: World) -> None:
    await world.guest.download_file(world.at(world.source / "tree"), world.target / "copy")
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


def cancel(world: World, gaps: Sequence[int] = ()) -> Fault:
    """Return a fault that cancels the story, and again after some suspensions."""

    def fault(run: Run) -> Generator[int, None, None]:
        for gap in (0, *gaps):
            if gap:
                yield gap
            if world.telling.cancel():
                run.struck = world.cancelled = True

    return fault


def lose(world: World) -> Fault:
    """Return a fault that loses the connection to the guest, or its agent."""

    def fault(run: Run) -> Generator[int, None, None]:
        if not world.telling.done():
            run.struck = True
            world.lose()
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
    "a lost connection": lose,
    "EMFILE for 5 awaits": lambda _: no_descriptors(5),
}


def check_faults(
    world: World, story: Story, few: int, record_property: Callable[[str, object], None]
) -> None:
    """Check that nothing is left after faults at the awaits of a story: at all, or at `few`."""
    run, problems = world.run(story, count(world), 1)
    assert (problems, run.error) == ([], None)
    every = [(fault, point) for fault in FAULTS for point in range(2, world.awaits[0])]
    sites: set[str] = set()
    for fault, point in every if EVERY else random.sample(every, few):
        run, problems = world.run(story, FAULTS[fault](world), point)
        assert not problems, f"{fault} at await {point} ({run.site}), {run.error!r}: {problems}"
        sites.update(run.site.split())
        if run.struck:
            where = f"in {story.__name__}() of a guest, {type(world).__name__}"
            record_property("injected", (f"{fault}, {where}", 1))
    record_property("injected at", sorted(sites))
