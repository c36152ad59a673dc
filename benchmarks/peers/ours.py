"""`smolvm_async`: its built-in Debian, from `async with` to the first command's answer.

ours.py [cold]
"""

import asyncio
import json
import sys
import tempfile
import time
import warnings
from typing import Literal

began = time.perf_counter()
from smolvm_async import AsyncSmolVM  # noqa: E402

imported = time.perf_counter() - began
COMMANDS = 10


async def main(data_dir: str) -> None:
    """Launch, run commands, take a snapshot and go back to it, stop."""
    warnings.simplefilter("ignore")
    boot: Literal["cold", "warm"] = "cold" if sys.argv[1:] == ["cold"] else "warm"
    began = time.perf_counter()
    async with AsyncSmolVM(accel="tcg", boot=boot, data_dir=data_dir) as vm:
        await vm.run("true")
        first = time.perf_counter() - began
        commands = []
        for _ in range(COMMANDS):
            began = time.perf_counter()
            await vm.run("true")
            commands.append(time.perf_counter() - began)
        began = time.perf_counter()
        await vm.snapshot("here")
        saved = time.perf_counter()
        async with AsyncSmolVM.from_snapshot("here", data_dir=data_dir) as clone:
            await clone.run("true")
            back = time.perf_counter()
            await clone.stop(timeout=0)
        stopping = time.perf_counter()
        await vm.stop()
        stopped = time.perf_counter() - stopping
    found = {"import": imported, "first": first, "commands": commands, "stop": stopped}
    print(json.dumps({**found, "snapshot": saved - began, "restore": back - saved}))


with tempfile.TemporaryDirectory() as name:
    asyncio.run(main(name))
