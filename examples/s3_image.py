"""Pull an image from S3 with a progress bar, and boot it; publish DIRECTORY first if it is given.

Usage: python examples/s3_image.py s3://BUCKET/PREFIX/ [DIRECTORY]
"""

from __future__ import annotations

import asyncio
import sys

from smolvm_async import AsyncSmolVM, ImageStore, Progress, SmolVMError, push_image

WIDTH = 30  # characters of the bar


def show(progress: Progress) -> None:
    """Draw a progress bar for a transfer; print a line for any other step."""
    if progress.done is None or not progress.total:
        print(f"{progress.elapsed:7.2f} s  {progress.stage:<6} {progress.message}", flush=True)
        return
    part = progress.done / progress.total
    bar = "#" * int(WIDTH * part)
    rate = f"{(progress.rate or 0) / (1 << 20):.0f} MiB/s"
    end = "\n" if progress.done == progress.total else "\r"
    print(f"{progress.message} [{bar:<{WIDTH}}] {part:4.0%}  {rate:<12}", end=end, flush=True)


async def main(uri: str, directory: str | None) -> None:
    """Publish the directory if it is given; then pull the image and boot it."""
    if directory is not None:
        manifest = await push_image(directory, uri, on_progress=show)
        print(f"published {manifest.name} at {uri}")
    async with AsyncSmolVM(image=uri, on_progress=show) as vm:
        for image in await ImageStore().list():
            print(f"in the cache: {image.name} ({image.os}, {image.size >> 20} MiB) {image.uri}")
        reached = await vm.wait_for("ready")
        print(f"{vm.vm_id} is {reached.state}: {reached.evidence}.")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        asyncio.run(main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else None))
    except SmolVMError as error:
        sys.exit(f"{type(error).__name__}: {error}")
