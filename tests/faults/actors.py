"""Processes that own, attach to and prune VMs, for the tests to kill.

`python -m tests.faults.actors` imports their modules once. For each line of JSON on stdin, the name
of an actor below and its arguments, it forks an actor. Each prints its process id and a word.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Generator
from typing import Any

from smolvm_async import AsyncSmolVM, SmolVMError
from smolvm_async.foundation import process
from tests.faults.injection import Run, run_once


def say(word: str) -> None:
    os.write(1, f"{os.getpid()} {word}\n".encode())  # in one piece, though other actors write, too


def make(image: str, data_dir: str, keep: bool) -> AsyncSmolVM:
    return AsyncSmolVM(
        os="windows",
        image=image,
        memory=2048,
        cpus=1,
        data_dir=data_dir,
        vm_id="vm",
        accel="tcg",
        keep=keep,
    )


async def owner(image: str, data_dir: str, keep: bool) -> None:
    """Run a VM until SIGUSR1."""
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, over.set)
    async with make(image, data_dir, keep):
        say("runs")
        await over.wait()


async def careless_owner(image: str, data_dir: str, keep: bool) -> None:
    """An owner whose children do not die with it."""
    process.die_with_owner = lambda script="": []
    await owner(image, data_dir, keep)


async def client(data_dir: str) -> None:
    """Attach until the VM ends."""
    async with await AsyncSmolVM.from_id("vm", data_dir=data_dir) as vm:
        say("attached")
        await vm.wait_stopped()


async def typist(data_dir: str) -> None:
    """Attach, and hold keys and a button down until the VM ends."""
    async with await AsyncSmolVM.from_id("vm", data_dir=data_dir) as vm:
        await vm.keyboard.down("ctrl+a")
        await vm.mouse.down()
        say("holds")
        await vm.wait_stopped()


async def viewer(data_dir: str) -> None:
    """Attach, start the VNC server, and take screenshots until the VM ends."""
    async with await AsyncSmolVM.from_id("vm", data_dir=data_dir) as vm:
        await vm.vnc.start("unix")
        say("views")
        while True:
            await vm.screenshot()


async def pruner(data_dir: str) -> None:
    """Prune until there is nothing more."""
    say("prunes")
    while await AsyncSmolVM.prune(data_dir=data_dir):
        pass


async def starter(image: str, data_dir: str) -> None:
    """Start what the others prune, and delete it."""
    say("starts")
    vm = make(image, data_dir, False)
    await vm.start()
    await vm.delete()


async def visitor(data_dir: str) -> None:
    """Find what the others prune or start, stop it and delete it."""
    say("looks")
    vm = await AsyncSmolVM.from_id("vm", data_dir=data_dir)
    await vm.start()
    await vm.stop(timeout=0)
    await vm.delete()


async def short_life(image: str, data_dir: str, keep: bool) -> None:
    """Start, stop, and delete what is not kept."""
    say("starts")
    vm = make(image, data_dir, keep)
    await vm.start()
    await vm.stop(timeout=0)
    if not keep:
        await vm.delete()


def killed_at(point: int, image: str, data_dir: str, keep: bool) -> None:
    """A short life, ended by SIGKILL at the n-th await, if there are as many."""

    def die(run: Run) -> Generator[int, None, None]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield 0

    run = run_once(lambda: short_life(image, data_dir, keep), die, point)
    assert not run.complaints, run.complaints


async def save_and_fork(image: str, data_dir: str) -> None:
    """Take a snapshot of a VM and one of its clone."""
    say("starts")
    vm = AsyncSmolVM(os="linux", image=image, memory=128, data_dir=data_dir, accel="tcg")
    async with vm:
        await vm.snapshot("one")
        async with vm.fork(1) as clones:
            await clones[0].snapshot("two")


def killed_saving_at(point: int, image: str, data_dir: str) -> None:
    """End by SIGKILL at the n-th await of `save_and_fork()`, if there are as many."""

    def die(run: Run) -> Generator[int, None, None]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield 0

    run = run_once(lambda: save_and_fork(image, data_dir), die, point)
    assert not run.complaints, run.complaints


ACTORS: tuple[Callable[..., Any], ...] = (
    owner,
    careless_owner,
    client,
    typist,
    viewer,
    pruner,
    starter,
    visitor,
    short_life,
    killed_at,
    killed_saving_at,
)


def act(name: str, *arguments: object) -> None:
    actor = {actor.__name__: actor for actor in ACTORS}[name]
    try:
        done = actor(*arguments)
        if done is not None:
            asyncio.run(done)
    except SmolVMError as error:
        say(type(error).__name__)
    else:
        say("ends")


def main() -> None:
    for line in sys.stdin:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # this process does not wait for them
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                act(*json.loads(line))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                say("fails")
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
