"""`smolvm_async`: its built-in Debian, from `async with` to the first command's answer."""

import asyncio
import json
import time
import warnings

began = time.perf_counter()
from smolvm_async import AsyncSmolVM  # noqa: E402

imported = time.perf_counter() - began
COMMANDS = 10


async def main() -> None:
    """Launch, run commands, stop."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    async with AsyncSmolVM(accel="tcg") as vm:
        await vm.run("true")
        first = time.perf_counter() - began
        commands = []
        for _ in range(COMMANDS):
            began = time.perf_counter()
            await vm.run("true")
            commands.append(time.perf_counter() - began)
        began = time.perf_counter()
        await vm.stop()
        stopped = time.perf_counter() - began
    found = {"import": imported, "first": first, "commands": commands, "stop": stopped}
    print(json.dumps(found))


asyncio.run(main())
