"""Downloads of an image from S3, against aioboto3's own `download_fileobj`, in turns.

The server is moto's on loopback, or any other (`SMOLVM_S3_ENDPOINT_URL` and the usual variables,
and a bucket that may be written to). The library also verifies the file and flushes it to the disk.

    .venv/bin/python benchmarks/s3.py [--mib 512] [--rounds 3] [--bucket NAME]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiofiles

sys.path.insert(0, str(Path(__file__).parent.parent))

from smolvm_async import ImageStore, push_image
from smolvm_async.images.s3.client import open_client
from tests.integration.s3_server import s3_server, settings

MIB = 1 << 20


def make_disk(directory: Path, mib: int) -> None:
    """Make a qcow2 full of random bytes."""
    raw = directory.with_suffix(".raw")
    with raw.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))
    directory.mkdir()
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw)]
    subprocess.run([*command, str(directory / "disk.qcow2")], check=True)
    raw.unlink()


async def library(uri: str, work: Path) -> float:
    """Return the seconds of the library, client included."""
    began = time.perf_counter()
    await ImageStore(work / "cache").pull(uri)
    seconds = time.perf_counter() - began
    shutil.rmtree(work / "cache")
    return seconds


async def plain(bucket: str, key: str, work: Path) -> float:
    """Return the seconds of `download_fileobj` into an aiofiles file, client included."""
    began = time.perf_counter()
    async with open_client() as client, aiofiles.open(work / "plain", "wb") as file:
        await client.download_fileobj(bucket, key, file)
    seconds = time.perf_counter() - began
    (work / "plain").unlink()
    return seconds


async def compare(bucket: str, mib: int, rounds: int, work: Path) -> None:
    """Print the seconds of both, in turns, and their ratio."""
    async with open_client() as client:
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            await client.create_bucket(Bucket=bucket)
    make_disk(work / "image", mib)
    uri = f"s3://{bucket}/smolvm-benchmark/"
    await push_image(work / "image", uri, os="linux")
    ours, theirs = [], []
    for number in range(rounds):
        theirs.append(await plain(bucket, "smolvm-benchmark/disk.qcow2", work))
        ours.append(await library(uri, work))
        print(
            f"round {number + 1}: download_fileobj {theirs[-1]:6.2f} s, library {ours[-1]:6.2f} s,"
            f" ratio {theirs[-1] / ours[-1]:.2f}",
            flush=True,
        )
    median, reference = statistics.median(ours), statistics.median(theirs)
    print(
        f"{mib} MiB: download_fileobj {mib / reference:.0f} MiB/s, library {mib / median:.0f} MiB/s"
        f" (verified, flushed): {reference / median:.2f} times as fast"
    )


def main() -> None:
    """Parse the options, and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bucket", default="benchmark")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        work = Path(name)
        if "SMOLVM_S3_ENDPOINT_URL" not in os.environ:
            os.environ |= settings(stack.enter_context(s3_server(work)))
        asyncio.run(compare(options.bucket, options.mib, options.rounds, work))


if __name__ == "__main__":
    main()
