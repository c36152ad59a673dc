"""Fetch one file of an image into the cache: download it once, and verify its content.

A file of the cache is named by its SHA-256. It gets this name only when it is complete and
verified. Until then it is a partial file in `arriving/`. A lock ensures that only one task of one
process downloads the file; all other tasks and processes wait for that task.

The file is downloaded and verified at the same time. `s3.download` writes parts of the file in
parallel. A `Verifier` in a thread reads the file from the front up to the first gap, computes the
digest, and decompresses the content. If the digest is wrong, the file is removed. If an earlier
process began the file, its bytes may be the damaged ones, so the download is repeated once from
the beginning.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, NamedTuple

import anyio

from smolvm_async.config.uri import Location, parse_uri
from smolvm_async.errors import HostError, ImageError
from smolvm_async.foundation.files import seal
from smolvm_async.foundation.locking import LockFile
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.progress import Meter, ProgressCallback
from smolvm_async.foundation.tasks import Slots, first_of, in_background, settle, take_exception
from smolvm_async.images import local, qcow2
from smolvm_async.images.cache.layout import MTIME, Layout, Published
from smolvm_async.images.cache.verifier import Verifier, WrongContentError
from smolvm_async.images.kinds import problem
from smolvm_async.images.manifest import LARGEST, ImageFile
from smolvm_async.images.s3.download import Download
from smolvm_async.images.s3.partial_file import PartialFile

logger = get_logger(__name__)

CONTENT = ".content"  # the suffix of the decompressed content of a partial file
STRIDE = 32 << 20  # bytes that the verifier reads per call in its thread
AT_ONCE = 2  # downloads at a time; each needs memory for buffers and zstd's window

_downloads = Slots(AT_ONCE)


class MissingFile(NamedTuple):
    """A file of an image that is not in the cache."""

    part: str  # `rootfs`, `kernel` or `initrd`
    file: ImageFile  # the file's entry in the manifest
    place: Location


def missing_files(published: Published, layout: Layout) -> list[MissingFile]:
    """Return the files of an image that are not in the cache."""
    location = parse_uri(published.uri)
    found = []
    for part, file in published.manifest.files.items():
        if not layout.holds(file):
            found.append(MissingFile(part, file, location.beside(file.name)))
    return found


class DownloadMeter(Meter):
    """The progress of an image's download: reports bytes and rate, at most every 0.1 s."""

    def __init__(self, name: str, total: int | None, callback: ProgressCallback | None) -> None:
        super().__init__(callback, "image", total)
        self._message = f"downloading {name}"
        self._finished = 0  # bytes of the files that are complete
        self._done: int | None = None  # bytes of the current file; `None` between two files
        self._old = 0  # bytes that earlier processes downloaded

    def on_bytes(self, done: int, size: int) -> None:
        """Note that `done` bytes of the current file have arrived; report them if due."""
        first = self._done is None
        if first:
            self._old += done
        self._done = done
        if first or self.due or done == size:
            self.tell(self._message)

    def finish_file(self, size: int) -> None:
        """Note that the current file, of `size` bytes, is complete."""
        self._finished += size
        self._done = None

    def tell(self, message: str) -> None:
        """Report the current bytes with another message."""
        done = self._finished + (self._done or 0)
        self.report(message, done, copied=done - self._old)


async def fetch_file(
    layout: Layout, missing: MissingFile, client: Any, meter: DownloadMeter
) -> None:
    """Download a file into the cache, or wait for the process that is already downloading it.

    Raises:
        ImageError: If the download fails, or the content is wrong; wrong content is removed.
        HostError: If the disk has no room; the file is removed if this call began it.
        OSError: If the file cannot be written; the partial file is removed.
    """
    lock = layout.arriving / f"{missing.file.digest}.lock"
    if lock.exists():
        meter.tell(f"waiting for {missing.file.name}: another task or process is downloading it")
    async with LockFile(lock).hold():
        if not layout.holds(missing.file):
            async with _downloads.of_this_loop():
                await _fetch(layout, missing, client, meter)
    meter.finish_file(missing.file.size or 0)


async def _fetch(layout: Layout, missing: MissingFile, client: Any, meter: DownloadMeter) -> None:
    part = layout.arriving / f"{missing.file.digest}.part"
    partial = PartialFile(part, meter.on_bytes)
    try:
        try:
            await _download(layout, missing, client, partial)
        except WrongContentError as error:
            if not partial.resumed:
                raise
            # The bytes that an earlier process downloaded may be the damaged ones.
            logger.warning("%s Downloading the file again from the beginning.", error)
            await in_background(discard, part)
            await _download(layout, missing, client, PartialFile(part, meter.on_bytes))
    except WrongContentError as error:
        await in_background(discard, part)
        raise ImageError(str(error)) from None
    except HostError:
        if not partial.resumed:
            await in_background(discard, part)
        raise
    except OSError:
        await in_background(discard, part)
        raise


async def _download(
    layout: Layout, missing: MissingFile, client: Any, partial: PartialFile
) -> None:
    """Download and verify the file at the same time, then give it its name in the cache."""
    content = partial.path.with_suffix(CONTENT)
    file, uri = missing.file, missing.place.uri
    download = Download(client, missing.place, file.size, LARGEST[missing.part], partial)
    await download.begin(extra_space=file.content_size or 0)
    verifier = Verifier(partial.path, file, content, uri)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(download.transfer)
            await _follow(verifier, partial, missing)
        whole = partial.path if file.compression is None else content
        await in_background(_finish, layout, missing, verifier, whole)
    except* Exception as errors:
        raise first_of(errors) from None
    finally:
        verifier.close()
        await in_background(content.unlink, True)
    await in_background(discard, partial.path)


async def _follow(verifier: Verifier, partial: PartialFile, missing: MissingFile) -> None:
    while (start := verifier.at) < partial.size:
        end = await partial.wait_beyond(start)
        if start == 0:
            await in_background(_check_beginning, partial.path, missing, missing.file.compression)
        work = in_background(verifier.read_to, min(end, start + STRIDE))
        verifying = asyncio.ensure_future(work)
        try:
            await asyncio.wait([verifying])
        except asyncio.CancelledError:  # let the thread stop before it has read everything
            verifier.abandoned = True
            await settle(asyncio.wait([verifying]))
            take_exception(verifying)
            raise
        verifying.result()
        if start == 0 and missing.file.compression is not None:
            await in_background(_check_beginning, partial.path.with_suffix(CONTENT), missing, None)


def _check_beginning(path: Path, missing: MissingFile, use: str | None) -> None:
    """Raise a `WrongContentError` if a disk begins like a file of another kind.

    The download then ends after the first bytes. Bytes of no known kind are left to the digest.
    """
    if missing.part != "rootfs" or path.stat().st_size == 0:
        return
    file = missing.file
    with path.open("rb") as begun:
        use = use or file.format or qcow2.detect_format(path)
        if reason := problem(begun.fileno(), file.name, use):
            raise WrongContentError(f"{missing.place.uri} {reason}, and publish the image again.")


def _finish(layout: Layout, missing: MissingFile, verifier: Verifier, path: Path) -> None:
    """Check the file, then add it to the cache by giving it its name there."""
    verifier.check()
    check_disk(path, missing.part, missing.file, missing.place.uri)
    os.utime(path, (MTIME, MTIME))
    seal(path, 0o400)
    os.replace(path, layout.path_of(missing.file))


def check_disk(path: Path, part: str, file: ImageFile, uri: str) -> None:
    """Raise a `WrongContentError` if the file is a disk that QEMU must not open."""
    if part != "rootfs":
        return
    try:
        with path.open("rb") as disk:
            local.check_disk(disk.fileno(), file.name, file.format or qcow2.detect_format(path))
    except qcow2.Qcow2Error as error:
        raise WrongContentError(f"{uri} {error}.") from None


def discard(part: Path) -> None:
    """Remove a partial file and its journal."""
    for suffix in (".part", ".json", ".new", CONTENT):
        part.with_suffix(suffix).unlink(missing_ok=True)
