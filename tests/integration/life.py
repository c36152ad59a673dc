"""The life of a VM in an event loop of the user; as a program, in the loop that is named.

python -m tests.integration.life asyncio|uvloop IMAGE DATA_DIR
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
import uvloop

from smolvm_async import AsyncSmolVM, Rung, Status, VMCrashedError
from tests.conftest import children, descriptors, processes

Run = Callable[[Coroutine[None, None, None]], None]


def new_vm(image: Path, data_dir: Path, vm_id: str | None = None) -> AsyncSmolVM:
    return AsyncSmolVM(os="windows", image=image, data_dir=data_dir, accel="tcg", vm_id=vm_id)


async def live(image: Path, data_dir: Path) -> None:
    """Start, use and stop a VM; kill one, and cancel one while it starts and while it runs."""
    asyncio.get_running_loop().slow_callback_duration = 60  # s: a busy host makes callbacks slow
    vm = new_vm(image, data_dir)
    await vm.start()
    assert (await vm.wait_for("firmware")).state == "firmware"
    assert sorted(processes(data_dir / vm.vm_id).values()) == ["qemu-system-x86", "swtpm"]
    assert (await vm.stop(timeout=0)).rung is Rung.QUIT
    await vm.delete()

    for name in ("qemu-system-x86", "swtpm"):
        with pytest.raises(VMCrashedError, match="killed by SIGKILL"):
            async with new_vm(image, data_dir) as vm:
                kill(name, data_dir / vm.vm_id)
                await asyncio.Event().wait()

    vm = new_vm(image, data_dir)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await vm.start()
    await vm.start()  # what was given up may be begun again
    await vm.delete()

    running = asyncio.Event()

    async def body() -> None:
        nonlocal vm
        async with new_vm(image, data_dir) as vm:
            running.set()
            await asyncio.Event().wait()

    owner = asyncio.create_task(body())
    await running.wait()
    owner.cancel()
    await asyncio.wait([owner])
    assert owner.cancelled()
    assert vm.status is Status.DELETED
    assert not processes(data_dir)
    assert not list(data_dir.iterdir())


def kill(name: str, directory: Path) -> None:
    """SIGKILL the process of this name that works in `directory`."""
    (pid,) = (pid for pid, found in processes(directory).items() if found == name)
    os.kill(pid, signal.SIGKILL)


LOOPS: dict[str, Run] = {"asyncio": asyncio.run, "uvloop": uvloop.run}


def main() -> None:
    """Live in the loop that the command line names; nothing is left in this process."""
    name, image, data_dir = sys.argv[1:]
    run = LOOPS[name]
    run(asyncio.sleep(0))  # what a loop keeps for the next one is there already
    before = descriptors()
    run(live(Path(image), Path(data_dir)))
    assert descriptors() == before
    assert not children()


if __name__ == "__main__":
    main()
