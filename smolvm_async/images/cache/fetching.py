"""One file of an image into the cache: once, whoever else wants it, and only if it is right."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio

from smolvm_async.config.vm_config import S3
from smolvm_async.errors import HostError, ImageError
from smolvm_async.foundation.files import seal
from smolvm_async.foundation.locking import LockFile
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.progress import Meter, ProgressCallback
from smolvm_async.foundation.tasks import Slots, first_of, in_background, settle, take_exception
from smolvm_async.images import qcow2
from smolvm_async.images.cache.layout import MTIME, Layout, Published
from smolvm_async.images.cache.reading import Reading, WrongContentError
from smolvm_async.images.manifest import LARGEST, ImageFile
from smolvm_async.images.s3.download import RemoteFile, begin, transfer
from smolvm_async.images.s3.partial_file import PartialFile
from smolvm_async.images.s3.uri import parse_uri

logger = get_logger(__name__)

STRIDE = 32 << 20  # bytes that the digest's thread reads at a time
AT_ONCE = 2  # files that arrive: each has buffers, and zstd's window

_places = Slots(AT_ONCE)


class Fetch(NamedTuple):
    """What to fetch.

    Attributes:
        part: What it is of the image: `rootfs`, `kernel`, `initrd`.
        file: What the manifest says of it.
        remote: Where it is.
    """

    part: str
    file: ImageFile
    remote: RemoteFile


def fetches(published: Published, layout: Layout) -> list[Fetch]:
    """What of an image is not in the cache."""
    location = parse_uri(published.uri)
    missing = []
    for part, file in published.manifest.files.items():
        if not layout.holds(file):
            key = location.beside(file.name)
            uri = f"{S3}{location.bucket}/{key}"
            remote = RemoteFile(location.bucket, key, uri, file.size, LARGEST[part])
            missing.append(Fetch(part, file, remote))
    return missing


class DownloadMeter(Meter):
    """Reports how much of all files has arrived, and how fast; not too often."""

    def __init__(self, name: str, total: int | None, callback: ProgressCallback | None) -> None:
        super().__init__(callback, "image", total)
        self._message = f"downloading {name}"
        self._finished = 0  # bytes of the files before this one
        self._done: int | None = None  # bytes of this one
        self._old = 0  # bytes that earlier processes had left

    def on_bytes(self, done: int, size: int) -> None:
        """So many bytes of this file are there."""
        first = self._done is None
        if first:
            self._old += done
        self._done = done
        if first or self.due or done == size:
            self.tell(self._message)

    def finish_file(self, size: int) -> None:
        """All of this file is there."""
        self._finished += size
        self._done = None

    def tell(self, message: str) -> None:
        """Report now."""
        done = self._finished + (self._done or 0)
        self.report(message, done, copied=done - self._old)


async def fetch_file(
    layout: Layout, fetch: Fetch, connect: Callable[[], Awaitable[Any]], meter: DownloadMeter
) -> None:
    """Have a file in the cache.

    Args:
        connect: Gives the client; only awaited if the file is not there.

    Raises:
        ImageError: If it cannot be had, or is wrong; then nothing of it is left.
        HostError: If the disk is full; then nothing of it is left.
    """
    lock = layout.arriving / f"{fetch.file.digest}.lock"
    if lock.exists():
        meter.tell(f"waiting for {fetch.file.name}, which is being downloaded already")
    async with LockFile(lock).hold():
        if not layout.holds(fetch.file):
            async with _places.of_this_loop():
                await _fetch(layout, fetch, await connect(), meter)
    meter.finish_file(fetch.file.size or 0)


async def _fetch(layout: Layout, fetch: Fetch, client: Any, meter: DownloadMeter) -> None:
    part = layout.arriving / f"{fetch.file.digest}.part"
    arrival = PartialFile(part, meter.on_bytes)
    try:
        try:
            await _arrive(layout, fetch, client, arrival)
        except WrongContentError as error:
            if not arrival.resumed:
                raise
            # What an earlier process left may be to blame: once more, from the beginning.
            logger.warning("%s Once more, from the beginning.", error)
            await in_background(discard, part)
            await _arrive(layout, fetch, client, PartialFile(part, meter.on_bytes))
    except WrongContentError as error:
        await in_background(discard, part)
        raise ImageError(str(error)) from None
    except HostError:
        if not arrival.resumed:
            await in_background(discard, part)
        raise
    except OSError as error:
        await in_background(discard, part)
        raise HostError(
            f"{fetch.remote.uri} cannot be written below {str(layout.root)!r}: {error.strerror}. "
            "Nothing of it is kept. Free some space (smolvm-async image prune), or set "
            "SMOLVM_IMAGE_DIR to another disk."
        ) from error


async def _arrive(layout: Layout, fetch: Fetch, client: Any, arrival: PartialFile) -> None:
    """Download and read it at the same time; then give it its name."""
    content = arrival.path.with_suffix(".content")
    await begin(client, fetch.remote, arrival, extra_space=fetch.file.content_size or 0)
    reading = Reading(arrival.path, fetch.file, content, fetch.remote.uri)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(transfer, client, fetch.remote, arrival)
            await _read(reading, arrival)
        whole = arrival.path if fetch.file.compression is None else content
        await in_background(_finish, layout, fetch, reading, whole)
    except* Exception as errors:
        raise first_of(errors) from None
    finally:
        reading.close()
        await in_background(content.unlink, True)
    await in_background(discard, arrival.path)


async def _read(reading: Reading, arrival: PartialFile) -> None:
    while reading.at < arrival.size:
        end = await arrival.wait_beyond(reading.at)
        work = in_background(reading.go_on, min(end, reading.at + STRIDE))
        going_on = asyncio.ensure_future(work)
        try:
            await asyncio.wait([going_on])
        except asyncio.CancelledError:  # does not wait until all that is decompressed
            reading.abandoned = True
            await settle(asyncio.wait([going_on]))
            take_exception(going_on)
            raise
        going_on.result()


def _finish(layout: Layout, fetch: Fetch, reading: Reading, path: Path) -> None:
    """Check it, and give it its name: from here on it counts as there."""
    reading.check()
    check_disk(path, fetch.part, fetch.file, fetch.remote.uri)
    os.utime(path, (MTIME, MTIME))
    seal(path, 0o400)
    os.replace(path, layout.path_of(fetch.file))


def check_disk(path: Path, part: str, file: ImageFile, uri: str) -> None:
    """Refuse a disk that QEMU shall not see.

    Raises:
        WrongContentError: If it is one.
    """
    if part != "rootfs" or file.format == "raw":
        return
    with path.open("rb") as disk:
        if file.format is None and not disk.read(4).startswith(qcow2.MAGIC):
            return  # a raw disk of the synchronous package
        try:
            qcow2.check(disk.fileno())
        except qcow2.Qcow2Error as error:
            raise WrongContentError(f"{uri} {error}.") from None


def discard(part: Path) -> None:
    """Remove what has arrived of a file, and its journal."""
    for suffix in (".part", ".json", ".new", ".content"):
        part.with_suffix(suffix).unlink(missing_ok=True)
