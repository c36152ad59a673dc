"""The built-in Linux's builder, given up and killed: the next build can go on from what is left."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from smolvm_async.foundation.progress import Progress
from smolvm_async.images.build.debian import build_debian, find_debian

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(200, func_only=True)]

LAST = "configuring packages in the guest"  # the step in which QEMU runs
EARLY = "unpacking packages"  # the build has its directory
BUILD = f"""
import asyncio, sys
from pathlib import Path
from smolvm_async.images.build.debian import build_debian

def show(progress):
    if progress.message == {LAST!r} and progress.done is not None:
        print("configuring", flush=True)

asyncio.run(build_debian(cache_dir=Path(sys.argv[1]), on_progress=show))
"""


@pytest.fixture
async def cache(tmp_path: Path) -> Path:
    """A cache that has the packages, and no image."""
    built = await build_debian()
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "packages").symlink_to(built.disk.parents[2] / "packages")
    return cache


async def test_a_build_that_is_killed_or_cancelled_leaves_nothing_in_the_way(cache: Path) -> None:
    builder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BUILD, str(cache)), stdout=asyncio.subprocess.PIPE
    )
    assert builder.stdout is not None
    assert await builder.stdout.readline() == b"configuring\n"
    os.kill(builder.pid, signal.SIGKILL)
    await builder.stdout.read()
    assert await builder.wait() == -signal.SIGKILL
    assert list((cache / "debian").glob("building-*"))
    assert find_debian(cache) is None

    begun = asyncio.Event()

    def watch(progress: Progress) -> None:
        if progress.message == EARLY:
            begun.set()

    building = asyncio.ensure_future(build_debian(cache_dir=cache, on_progress=watch))
    await begun.wait()
    await asyncio.sleep(0)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert not [*(cache / "debian").iterdir()]
