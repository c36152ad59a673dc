"""Run many VMs in one process, and print its figures after the first VM and at the end.

python -m tests.faults.soak IMAGE DATA_DIR ONE_AFTER_ANOTHER AT_ONCE
"""

from __future__ import annotations

import asyncio
import gc
import json
import linecache
import logging
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

from smolvm_async import AsyncSmolVM, VMTimeoutError
from tests.conftest import children, descriptors, vm_in

Figures = dict[str, object]


async def one(image: Path, data_dir: Path) -> None:
    async with vm_in(data_dir, image, timeouts={"input": 0.005}) as vm:
        await vm.wait_for("firmware")
        async with await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir) as seen:
            await use_desktop(seen)
        await vm.stop(timeout=0)


async def use_desktop(vm: AsyncSmolVM) -> None:
    """Use all of the desktop that needs no guest."""
    await vm.screenshot()
    with suppress(VMTimeoutError):  # the firmware reads no key yet
        await vm.keyboard.press("a")
    await vm.vnc.start("unix")
    await vm.pause()
    await vm.resume()
    await vm.vnc.stop()


async def figures(data_dir: Path) -> Figures:
    """Return the figures of this process, without garbage."""
    await asyncio.sleep(0)  # the loop holds the future that woke this task until its next turn
    linecache.clearcache()  # the lines that the QMP client's tracebacks quote, if it makes any
    while gc.collect():
        pass
    return {
        "descriptors": sorted(kind(link) for link in descriptors().values()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "children": len(children()),
        "entries": [entry.name for entry in data_dir.iterdir()],
        "tasks": len(asyncio.all_tasks()),
        "loggers": len(logging.root.manager.loggerDict),
        "resident_kib": resident(),
        "blocks": sys.getallocatedblocks(),
        "objects": Counter(type(thing).__qualname__ for thing in gc.get_objects()),
    }


def kind(link: str) -> str:
    """Return the target of a descriptor without the number that makes each different."""
    return link.partition(":[")[0]


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def main() -> None:
    image, data_dir = map(Path, sys.argv[1:3])
    in_turn, at_once = map(int, sys.argv[3:])
    # The first VM, and the first that run at once, fill the caches.
    await one(image, data_dir)
    await asyncio.gather(*(one(image, data_dir) for _ in range(at_once)))
    first = await figures(data_dir)
    for _ in range(in_turn):
        await one(image, data_dir)
    after_turns = await figures(data_dir)
    await asyncio.gather(*(one(image, data_dir) for _ in range(at_once)))
    print(json.dumps([first, after_turns, await figures(data_dir)]))


if __name__ == "__main__":
    asyncio.run(main())
