"""A fault at every await of start, body, stop and delete: nothing is left, the next VM starts.

Processes, descriptors, threads, the data directory and `list()` are compared after each fault. To
start the next VM costs as much as the fault itself, so it is started after every fourth fault and
after the last run; chance says which of four.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, HostError, LaunchError, Status, VMTimeoutError
from tests.conftest import descriptors, each_rung, fill_up
from tests.faults.injection import (
    PROGRAMS,
    Fault,
    Run,
    at_the_awaits,
    count_awaits,
    run_once,
)

QEMU, SWTPM = PROGRAMS
MOMENT = 0.005  # seconds
UNREAD = {"input": 0.01}  # the firmware reads no key yet, and never has a use for the tablet
IMPATIENT = {"launch": 0.5, **each_rung(0.1), **UNREAD}


Story = Callable[["World"], Coroutine[Any, Any, None]]


class World:
    """The image, the directory and the timeouts of the scenarios."""

    def __init__(self, image: Path, data_dir: Path) -> None:
        self.image = image
        self.data_dir = data_dir
        self.timeouts = UNREAD

    def vm(self, *, keep: bool = False) -> AsyncSmolVM:
        return AsyncSmolVM(
            os="windows",
            image=self.image,
            memory=2048,
            cpus=1,
            data_dir=self.data_dir,
            vm_id="vm",
            accel="tcg",
            keep=keep,
            timeouts=self.timeouts,
        )

    async def found(self) -> AsyncSmolVM:
        return await AsyncSmolVM.from_id("vm", data_dir=self.data_dir)


@asynccontextmanager
async def started(world: World) -> AsyncIterator[AsyncSmolVM]:
    """Run a VM. `block` and `explicit` have all faults at the awaits of its start."""
    count_awaits(False)
    async with world.vm() as vm:
        count_awaits(True)
        yield vm


async def use(vm: AsyncSmolVM) -> None:
    with suppress(VMTimeoutError):
        await vm.wait_for("ready", timeout=MOMENT)
    with suppress(TimeoutError):
        async with asyncio.timeout(MOMENT):
            async for _ in vm.events():
                pass
    with suppress(TimeoutError):
        async with asyncio.timeout(MOMENT):
            await vm.wait_stopped()


async def block(world: World) -> None:
    async with world.vm() as vm:
        await use(vm)


async def explicit(world: World) -> None:
    vm = world.vm()
    try:
        await vm.start()
        await use(vm)
        await vm.stop(timeout=0)
    finally:
        await vm.delete()


async def kept(world: World) -> None:
    async with world.vm(keep=True):
        pass
    vm = await world.found()
    try:
        await vm.start()
        await vm.stop(timeout=0)
    finally:
        await vm.delete()


async def attached(world: World) -> None:
    async with started(world):
        async with await world.found() as seen:
            await use(seen)
        seen = await world.found()
        await seen.stop(timeout=0)
        await seen.detach()


async def deleted_by_another(world: World) -> None:
    async with started(world):
        seen = await world.found()
        try:
            await seen.delete()
        finally:
            await seen.detach()


STORIES: list[Story] = [block, explicit, kept, attached, deleted_by_another]


async def use_desktop(vm: AsyncSmolVM) -> None:
    await asyncio.gather(vm.screenshot(), vm.screenshot())
    with suppress(VMTimeoutError):
        await vm.wait_for_screen(stable=1, timeout=MOMENT, interval=MOMENT)
    with suppress(VMTimeoutError):
        await vm.keyboard.press("a")
    with suppress(VMTimeoutError):
        await vm.mouse.click(1, 1)
    await vm.vnc.start("unix")
    await vm.pause()
    await vm.resume()
    await vm.vnc.stop()


async def desktop(world: World) -> None:
    async with started(world) as vm:
        await use_desktop(vm)
        await vm.stop(timeout=0)


async def attached_desktop(world: World) -> None:
    async with started(world), await world.found() as seen:
        await use_desktop(seen)


DESKTOPS: list[Story] = [desktop, attached_desktop]


def cancel(run: Run) -> Generator[int, None, None]:
    run.cancel()
    yield from ()


def cancel_twice(gap: int) -> Fault:
    def fault(run: Run) -> Generator[int, None, None]:
        run.cancel()
        yield gap
        run.cancel()

    return fault


def send(number: signal.Signals, *names: str) -> Fault:
    def fault(run: Run) -> Generator[int, None, None]:
        run.signal(number, *names)
        yield from ()

    return fault


def no_descriptors(duration: int) -> Fault:
    def fault(run: Run) -> Generator[int, None, None]:
        run.struck = True
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()) + 1, hard))
        taken = []
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            yield duration
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)

    return fault


def no_space(directory: Path) -> Fault:
    def fault(run: Run) -> Generator[int, None, None]:
        run.struck = True
        filler = fill_up(directory)
        try:
            yield FOR_EVER
        finally:
            filler.unlink()

    return fault


FOR_EVER = 1 << 30
FAULTS: dict[str, Fault] = {
    "cancel": cancel,
    "cancel, and 1 await later": cancel_twice(1),
    "cancel, and 2 awaits later": cancel_twice(2),
    "cancel, and 3 awaits later": cancel_twice(3),
    "cancel, and 5 awaits later": cancel_twice(5),
    "SIGKILL QEMU": send(signal.SIGKILL, QEMU),
    "SIGKILL swtpm": send(signal.SIGKILL, SWTPM),
    "SIGKILL QEMU and swtpm": send(signal.SIGKILL, QEMU, SWTPM),
    "SIGTERM QEMU": send(signal.SIGTERM, QEMU),
    "SIGTERM swtpm": send(signal.SIGTERM, SWTPM),
    "SIGSTOP QEMU": send(signal.SIGSTOP, QEMU),  # it answers neither QMP nor SIGTERM
    "SIGSTOP swtpm": send(signal.SIGSTOP, SWTPM),
    "EMFILE until the next await": no_descriptors(1),
    "EMFILE for 5 awaits": no_descriptors(5),
    "EMFILE to the end": no_descriptors(FOR_EVER),
}
ENOSPC = "ENOSPC to the end"

# Which stories have which faults, at every n-th of their awaits: the machine's time is finite.
# Where n is not 1, chance says which. `tests/run.sh --all` sets SMOLVM_ASYNC_EVERY_FAULT=1, and n
# is 1 everywhere.
PLAN: list[tuple[str, list[Story], int]] = [
    ("cancel", [block], 1),
    ("cancel", [kept, attached, deleted_by_another], 2),
    ("cancel", [explicit, desktop], 4),  # `explicit` starts as `block` does
    ("cancel", [attached_desktop], 10),
    ("cancel, and 1 await later", [block], 4),
    ("cancel, and 1 await later", [explicit, kept], 8),
    ("cancel, and 1 await later", [desktop], 12),
    ("cancel, and 2 awaits later", [explicit], 4),
    ("cancel, and 2 awaits later", [attached_desktop], 12),
    ("cancel, and 3 awaits later", [attached], 4),
    ("cancel, and 5 awaits later", [block], 4),
    ("cancel, and 5 awaits later", [desktop], 12),
    ("SIGKILL QEMU", [block], 1),
    ("SIGKILL QEMU", [explicit, kept, attached], 4),
    ("SIGKILL QEMU", DESKTOPS, 8),
    ("SIGKILL swtpm", [block], 1),
    ("SIGKILL swtpm", [deleted_by_another], 2),
    ("SIGKILL swtpm", [kept], 8),
    ("SIGKILL swtpm", [attached_desktop], 16),
    ("SIGKILL QEMU and swtpm", [explicit, attached], 4),
    ("SIGKILL QEMU and swtpm", [desktop], 12),
    ("SIGTERM QEMU", [explicit], 4),
    ("SIGTERM QEMU", [desktop], 12),
    ("SIGTERM swtpm", [block], 4),
    ("SIGTERM swtpm", [desktop], 16),
    ("SIGSTOP QEMU", [block, explicit, kept], 4),
    ("SIGSTOP QEMU", DESKTOPS, 12),
    ("SIGSTOP swtpm", [explicit, kept], 4),
    ("SIGSTOP swtpm", [desktop], 12),
    ("EMFILE until the next await", [explicit], 4),
    ("EMFILE until the next await", [kept], 8),
    ("EMFILE until the next await", [desktop], 12),
    ("EMFILE for 5 awaits", [block], 4),
    ("EMFILE for 5 awaits", [attached], 6),
    ("EMFILE for 5 awaits", [attached_desktop], 16),
    ("EMFILE to the end", [explicit], 4),
    ("EMFILE to the end", [deleted_by_another], 6),
    ("EMFILE to the end", [kept], 8),
    ("EMFILE to the end", [desktop], 12),
    (ENOSPC, [block], 4),
    (ENOSPC, [kept], 8),
    (ENOSPC, [desktop], 12),
]
EVERY = "SMOLVM_ASYNC_EVERY_FAULT" in os.environ
STARTS = 1 if EVERY else 4  # faults for each start of the next VM


@pytest.fixture
def world(blank_image: Path, tmp_path: Path) -> Iterator[World]:
    gc.collect()
    gc.freeze()  # a collection after every run has only its leavings to look at
    yield World(blank_image, tmp_path / "data")
    gc.unfreeze()


@pytest.mark.parametrize(
    ("fault", "story", "stride"),
    [
        pytest.param(fault, story, 1 if EVERY else stride, id=f"{fault}-{story.__name__}")
        for fault, stories, stride in PLAN
        for story in stories
    ],
)
def test_at_every_await(
    world: World,
    fault: str,
    story: Story,
    stride: int,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if "SIGSTOP" in fault:
        monkeypatch.setattr("smolvm_async.qemu.monitor.ANSWER", 0.3)
        world.timeouts = IMPATIENT
    if fault == ENOSPC:
        world.data_dir = request.getfixturevalue("small_disk") / "data"
        inject = no_space(world.data_dir.parent)
    else:
        inject = FAULTS[fault]
    prune = fault.startswith(("EMFILE", "ENOSPC"))
    turn = random.SystemRandom().randrange(STARTS)
    struck = 0
    sites: set[str] = set()
    for run in at_the_awaits(lambda: story(world), inject, stride):
        if run.count < run.point:
            check(run, world, "no fault", prune=prune)
        elif run.struck:
            struck += 1
            sites.update(run.site.split())
            start = struck % STARTS == turn
            check(run, world, f"{fault} at await {run.point}", prune=prune, start=start)
    assert struck > 3
    record_property("injected", (fault, struck))
    record_property("injected at", sorted(sites))


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN])
@pytest.mark.parametrize("story", STORIES)
def test_at_every_spawn(
    world: World,
    story: Story,
    number: int,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(subprocess.Popen[bytes]):
        spawns = 0

        def __init__(self, *arguments: Any, **options: Any) -> None:
            Failing.spawns += 1
            if Failing.spawns == nth:
                raise OSError(number, os.strerror(number))
            super().__init__(*arguments, **options)

    for nth in itertools.count(1):
        Failing.spawns = 0
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", Failing)
            run = run_once(lambda: story(world))
        check(run, world, f"{errno.errorcode[number]} at spawn {nth}")
        if Failing.spawns < nth:
            assert run.error is None
            break
        assert isinstance(run.error, LaunchError)
        assert os.strerror(number) in str(run.error)
    record_property("injected", (f"{errno.errorcode[number]} at a spawn", nth - 1))


@pytest.mark.parametrize("story", STORIES)
def test_without_a_thread(world: World, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        run = run_once(lambda: story(world))
    assert isinstance(run.error, HostError)
    check(run, world, "no thread")


def check(run: Run, world: World, fault: str, *, prune: bool = False, start: bool = True) -> None:
    problems = run.problems()
    try:
        asyncio.run(look_for_leftovers(World(world.image, world.data_dir), prune, start))
    except Exception as error:
        problems.append(f"something is left, or the next VM does not start: {error!r}")
    assert not problems, f"{fault} ({run.site}), {run.error!r}: {problems}"


async def look_for_leftovers(world: World, prune: bool, start: bool) -> None:
    """Find nothing but a kept VM at rest. With `start`, that VM starts, and so does a new one."""
    if prune:  # a kept VM could not write down that it is at rest
        await AsyncSmolVM.prune(data_dir=world.data_dir)
    infos = await AsyncSmolVM.list(data_dir=world.data_dir)
    assert {path.name for path in world.data_dir.glob("*")} == {info.vm_id for info in infos}
    for info in infos:
        assert info.keep, info
        assert info.status in (Status.STOPPED, Status.CRASHED), info
        vm = await world.found()
        if start:
            await vm.start()
        await vm.delete()
    if start:
        vm = world.vm()
        await vm.start()
        await vm.delete()
    assert not list(world.data_dir.glob("*"))
