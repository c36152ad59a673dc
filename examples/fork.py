"""Live copies of a running sandbox: prepare one, fork it, and let each copy do a part."""

from __future__ import annotations

import asyncio
import sys
import time

from smolvm_async import AsyncSmolVM, SmolVMError

COPIES = 3
PREPARE = "seq 1 3000 >/run/numbers"  # /run is in memory: the copies have it, too


async def main() -> None:
    """Fork a sandbox and add up what the copies answer."""
    async with AsyncSmolVM(memory=256) as vm:
        await vm.run(PREPARE, check=True)
        began = time.monotonic()
        async with vm.fork(COPIES) as copies:
            print(f"{COPIES} copies run after {time.monotonic() - began:.2f} s.")
            parts = await asyncio.gather(*(add_up(copy, n) for n, copy in enumerate(copies)))
        print("Together:", sum(parts))
        assert sum(parts) == sum(range(3001))


async def add_up(vm: AsyncSmolVM, part: int) -> int:
    """Return the sum of every COPIES-th number, from a copy of the sandbox."""
    program = f"awk 'NR % {COPIES} == {part} {{ sum += $1 }} END {{ print sum }}' /run/numbers"
    result = await vm.run(f"hostname; {program}", check=True)
    name, total = result.stdout.split()
    print(f"{name}: {total}")
    return int(total)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except SmolVMError as error:
        sys.exit(f"{type(error).__name__}: {error}")
