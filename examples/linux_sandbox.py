"""A Linux sandbox with the built-in image: run a command, upload and download a file."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from smolvm_async import AsyncSmolVM, Progress, SmolVMError

PROGRAM = """\
import pathlib, platform
text = pathlib.Path("/root/numbers.txt").read_text()
print("Python", platform.python_version(), "adds up to", sum(map(int, text.split())))
"""


def show(progress: Progress) -> None:
    """Print one step of the progress."""
    amount = ""
    if progress.done is not None and progress.total:
        amount = f" ({100 * progress.done // progress.total} %)"
    print(f"{progress.elapsed:7.2f} s  {progress.stage:<6} {progress.message}{amount}", flush=True)


async def main() -> None:
    """Start a sandbox and use it."""
    began = time.monotonic()
    async with AsyncSmolVM(on_progress=show) as vm:
        print((await vm.run("uname -a")).stdout, end="")
        print(f"The first command was done after {time.monotonic() - began:.1f} s.")
        with tempfile.TemporaryDirectory() as name:
            numbers = Path(name) / "numbers.txt"
            numbers.write_text("\n".join(map(str, range(101))))
            await vm.upload_file(numbers, "/root/numbers.txt")
            result = await vm.run("python3 - | tee /root/result.txt", input=PROGRAM, check=True)
            await vm.download_file("/root/result.txt", Path(name) / "result.txt")
            assert (Path(name) / "result.txt").read_text() == result.stdout
        print(result.stdout, end="")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except SmolVMError as error:
        sys.exit(f"{type(error).__name__}: {error}")
