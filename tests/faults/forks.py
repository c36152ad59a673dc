"""An owner, or an attached process, that forks: forks.py own|attach|die|uvloop IMAGE DATA_DIR.

`own` and `attach` fork one child for each ending in `ENDINGS`, while the VM runs. Afterwards they
use the VM, and stop it. They print a line of JSON for each child, and one for the VM.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import uvloop

from smolvm_async import AsyncSmolVM, SmolVMError

DEADLINE = 60.0


async def calls(vm: AsyncSmolVM) -> list[str]:
    """Call the VM's methods; return the results that are not the error of a forked child."""
    wrong = []
    for name, call in {
        "run": lambda: vm.run("true"),
        "start": vm.start,
        "stop": vm.stop,
        "delete": vm.delete,
        "pause": vm.pause,
        "detach": vm.detach,
        "screenshot": vm.screenshot,
        "type": lambda: vm.keyboard.type("a"),
        "click": lambda: vm.mouse.click(1, 1),
        "wait_stopped": vm.wait_stopped,
        "wait_for": lambda: vm.wait_for("firmware"),
        "expose_local": lambda: vm.expose_local(80),
        "events": lambda: anext(vm.events()),
    }.items():
        try:
            wrong.append(f"{name}: {await call()!r}")  # type: ignore[operator]
        except SmolVMError as error:
            if "forked child" not in str(error):
                wrong.append(f"{name}: {error!r}")
    return wrong


def collect(vm: AsyncSmolVM) -> None:
    vm._handle = None  # type: ignore[assignment]
    gc.collect()


def delete_at_exit(vm: AsyncSmolVM) -> None:
    atexit.register(lambda: asyncio.run(calls(vm)))


ENDINGS: dict[str, Callable[[AsyncSmolVM], object]] = {
    "sys.exit": lambda vm: sys.exit(3),
    "an exception": lambda vm: 1 // 0,
    "the end of the block": lambda vm: None,
    "os._exit": lambda vm: os._exit(3),
    "garbage collection": collect,
    "an atexit handler": delete_at_exit,
    "a loop of its own": lambda vm: print(asyncio.run(calls(vm)), file=sys.stderr),
}


async def wait(pid: int) -> int:
    """Wait until a child has ended, and return its exit status."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        await asyncio.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise TimeoutError(f"child {pid} hung")


def fork_in_thread() -> int:
    """Fork in another thread; the child collects garbage, and its only thread ends."""
    pids = []

    def fork() -> None:
        pids.append(os.fork())
        gc.collect()

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    return pids[0]


def daemonise() -> NoReturn:
    """Become a daemon that goes on with the parent's block, as a child of a child does."""
    os.setsid()
    if os.fork():
        os._exit(3)
    sys.exit(3)


def tell(**values: object) -> None:
    print(json.dumps(values), flush=True)


async def use(vm: AsyncSmolVM) -> None:
    """Fork the children, and show that the VM is as before."""
    for name, end in ENDINGS.items():
        if not (pid := os.fork()):
            end(vm)
            if name != "the end of the block":
                sys.exit(3)
            return
        tell(child=name, status=await wait(pid))
    if not (pid := os.fork()):
        wrong = await calls(vm)  # in the coroutine that has forked
        os._exit(3 if not wrong else 4)
    tell(child="a call in the forked coroutine", status=await wait(pid))
    if not (pid := os.fork()):
        daemonise()
    tell(child="a daemon", status=await wait(pid))
    tell(child="a thread", status=await wait(fork_in_thread()))
    async with asyncio.timeout(DEADLINE):
        shot = await vm.screenshot()
        report = await vm.stop(timeout=0)
    tell(width=shot.width, rung=report.rung)


async def own(image: str, data_dir: str) -> None:
    async with AsyncSmolVM(
        os="windows", image=image, memory=2048, accel="tcg", data_dir=data_dir, vm_id="vm"
    ) as vm:
        await use(vm)


async def attach(image: str, data_dir: str) -> None:
    async with await AsyncSmolVM.from_id("vm", data_dir=data_dir) as vm:
        await use(vm)


async def unwind(image: str, data_dir: str) -> None:
    """Fork a child that leaves its copy of the block."""
    async with AsyncSmolVM(
        os="windows", image=image, memory=2048, accel="tcg", data_dir=data_dir, vm_id="vm"
    ) as vm:
        if not (pid := os.fork()):
            sys.exit(3)
        status = await wait(pid)
        async with asyncio.timeout(DEADLINE):
            shot = await vm.screenshot()
            report = await vm.stop(timeout=0)
        tell(child=status, width=shot.width, rung=report.rung)


async def die(image: str, data_dir: str) -> None:
    """Run a VM and leave a forked child behind, which lives on after this process was killed."""
    async with AsyncSmolVM(
        os="windows", image=image, memory=2048, accel="tcg", data_dir=data_dir, vm_id="vm"
    ):
        sys.stdin.readline()  # until the other process is attached
        await asyncio.sleep(0.1)  # until the server has accepted it
        if not os.fork():
            tell(child=os.getpid())
            threading.Event().wait()
        await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "uvloop":
        uvloop.run(unwind(*sys.argv[2:]))
    else:
        asyncio.run({"own": own, "attach": attach, "die": die}[sys.argv[1]](*sys.argv[2:]))
