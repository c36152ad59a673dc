"""`ImageStore`, the cache of published images on this machine.

The cache adds, protects and removes images as follows:

- `look()` reads the manifest from S3, or from the record of the last pull if S3 is unreachable.
- `fetch()` downloads the missing files (see `fetching`), then writes a record of the URI, the
  manifest and the time. While files are missing, a temporary record with the suffix `.pulling`
  protects the files that have already arrived.
- `hold()` protects the files of a VM that is starting. It takes the cache's lock, opens the files,
  and takes a shared lock on each file, so no file can be removed in between. The shared locks last
  until QEMU has opened the files and holds its own locks.
- A kept VM that is stopped holds no lock. Its record names its files. The cache lists the data
  directories of its VMs in `data-dirs/`, so that a removal finds these records.
- `remove()`, `prune()` and `verify()` take the cache's lock, and keep each file that a lock or a
  VM's record protects (see `tidying`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from smolvm_async.config.checks import check_integer, shown
from smolvm_async.config.source import Source
from smolvm_async.config.uri import Location, is_published, parse_uri
from smolvm_async.errors import ConfigError, ImageError
from smolvm_async.foundation.fork import close_private
from smolvm_async.foundation.locking import try_lock
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.foundation.tasks import Shared, in_background
from smolvm_async.images.cache.fetching import (
    DownloadMeter,
    check_disk,
    fetch_file,
    missing_files,
)
from smolvm_async.images.cache.layout import ImageRecord, Layout, Published, cache_root
from smolvm_async.images.cache.tidying import (
    PULLING,
    Damage,
    actual_digest,
    files_of,
    find_images,
    is_whole,
    remove_damaged,
    remove_images,
    remove_old,
)
from smolvm_async.images.cache.verifier import WrongContentError
from smolvm_async.images.local import ROOT_DISK
from smolvm_async.images.manifest import MAX_MANIFEST, ImageFile, parse_manifest
from smolvm_async.images.qcow2 import detect_format
from smolvm_async.images.s3.client import endpoint, open_client, read_at_most
from smolvm_async.images.s3.errors import explain, is_offline

logger = get_logger(__name__)

T = TypeVar("T")

_lookups: Shared[Published] = Shared()
_fetches: Shared[None] = Shared()


@dataclass(frozen=True)
class CachedImage:
    """A published image on this machine.

    Attributes:
        uri: The URI of its manifest.
        name: The image's name.
        os: The guest OS.
        size: Bytes of its files, which other images may share.
        pulled: Time of the download, in seconds since the epoch.
        used: Time of the last pull or boot, in seconds since the epoch.
        disk: The path of the disk.
        kernel: The path of the kernel, if the image has a kernel.
        initrd: The path of the initramfs, if the image has an initramfs.
    """

    uri: str
    name: str
    os: str
    size: int
    pulled: float
    used: float
    disk: Path
    kernel: Path | None = None
    initrd: Path | None = None


class ImageStore:
    """The published images on this machine. A disk that two URIs share is stored once.

    Any number of tasks and processes may use one cache at the same time.

    Args:
        data_dir: The cache's directory; by default `$SMOLVM_IMAGE_DIR`, else
            `$XDG_CACHE_HOME/smolvm-async/images`.

    Raises:
        ConfigError: `data_dir` is not a path.
    """

    def __init__(self, data_dir: str | os.PathLike[str] | None = None) -> None:
        self._layout = Layout(cache_root(data_dir))

    @property
    def root(self) -> Path:
        """Return the cache's directory."""
        return self._layout.root

    async def pull(self, uri: str, *, on_progress: ProgressCallback | None = None) -> CachedImage:
        """Download the files of an image that are not in the cache yet.

        Args:
            uri: `s3://BUCKET/PREFIX/`, or the URI of the manifest itself.
            on_progress: Called with the bytes so far, their total, and the rate.

        Raises:
            ImageError: The download failed, or a file does not match the manifest.
            HostError: The image does not fit on the disk, or the cache cannot be written.
        """
        layout = self._layout
        published = await self.look(uri)
        await self.fetch(published, on_progress)
        return await in_background(lambda: _as_cached(layout, _recorded(layout, published)))

    async def list(self) -> Sequence[CachedImage]:
        """Return the complete images, the most recently used first."""
        layout = self._layout
        with layout.explained():
            return await in_background(
                lambda: [
                    _as_cached(layout, image)
                    for image in layout.records()
                    if is_whole(layout, image)
                ]
            )

    async def remove(self, name_or_uri: str) -> Sequence[CachedImage]:
        """Remove an image, and those of its files that no other image uses.

        Returns:
            The removed images: all images with that name, or the image with that URI.

        Raises:
            ImageError: No image has that name or URI, or a running or kept VM needs the image.
        """
        wanted = _canonical(name_or_uri)

        def remove() -> list[CachedImage]:
            images = find_images(self._layout, wanted)
            removed = [_as_cached(self._layout, image) for image in images]
            remove_images(self._layout, images)
            return removed

        return await self._locked(remove)

    async def prune(
        self, *, max_bytes: int | None = None, unused_since: datetime | None = None
    ) -> Sequence[CachedImage]:
        """Remove images that have not been used for a long time, or that take too much space.

        Images that a VM needs are kept. Partial downloads and unneeded files are removed as well.

        Args:
            max_bytes: Remove the least recently used images until all files fit into this size.
            unused_since: Remove images that were last pulled or booted before this time.

        Returns:
            The removed images.

        Raises:
            ConfigError: An argument is wrong.
        """
        if max_bytes is not None:
            check_integer("max_bytes", max_bytes, 0, None, "bytes, 0 or more")
        if unused_since is not None and not isinstance(unused_since, datetime):
            raise ConfigError(
                f"unused_since={shown(unused_since)} is wrong: pass a datetime, such as "
                "datetime.now() - timedelta(days=30)."
            )
        try:
            since = unused_since.timestamp() if unused_since is not None else None
        except (ValueError, OverflowError):  # before the earliest possible timestamp
            since = 0.0

        def prune() -> list[CachedImage]:
            removed = remove_old(self._layout, max_bytes, since)
            return [_as_cached(self._layout, image) for image in removed]

        return await self._locked(prune)

    async def verify(self, name_or_uri: str | None = None) -> Sequence[Damage]:
        """Read every file of an image, or of all images, and check its digest.

        Returns:
            The damaged and missing files. A damaged file was removed unless a VM needs it.

        Raises:
            ImageError: No image has that name or URI.
        """
        layout = self._layout
        if name_or_uri is not None:
            name_or_uri = _canonical(name_or_uri)
        with layout.opened():
            return [
                await self._locked(partial(remove_damaged, layout, path, actual))
                for path in await in_background(files_of, layout, name_or_uri)
                if (actual := await in_background(actual_digest, path)) != path.name
            ]

    async def look(self, uri: str) -> Published:
        """Return an image's manifest from S3; if S3 is unreachable, return that of the last pull.

        Raises:
            ImageError: The manifest cannot be read, or is not valid.
        """
        location = parse_uri(uri, "uri")
        key = (self.root, endpoint(), location.uri)
        with self._layout.opened():
            return await _lookups.join(key, lambda _: self._look(location), None)

    async def _look(self, location: Location) -> Published:
        cached = await in_background(_cached, self._layout, location.uri)
        try:
            async with open_client(hurried=cached is not None) as client:
                content = await _read_manifest(client, location)
        except ImageError as error:
            if cached is None or not is_offline(error):
                raise
            logger.warning("%s Using the cached image from the last pull.", error)
            return cached.published
        manifest = await in_background(parse_manifest, content, location.uri)
        return Published(location.uri, endpoint(), manifest)

    async def fetch(self, published: Published, on_progress: ProgressCallback | None) -> Source:
        """Download the missing files of an image; return the files that a VM boots from.

        Raises:
            ImageError, HostError: See `pull()`.
        """
        key = (self.root, published.endpoint, published.uri, published.manifest.rootfs.digest)
        with self._layout.opened():
            await _fetches.join(key, lambda tell: self._fetch(published, tell), on_progress)
            return await in_background(_source, self._layout, published)

    async def _fetch(self, published: Published, on_progress: ProgressCallback) -> None:
        layout = self._layout
        if missing := await in_background(missing_files, published, layout):
            if published.endpoint != endpoint():
                raise ConfigError(
                    "SMOLVM_S3_ENDPOINT_URL was changed after the manifest was read: create a new "
                    "VM."
                )
            record = layout.record_path(published.uri, published.endpoint)
            pulling = record.with_suffix(f".{os.urandom(8).hex()}{PULLING}")
            sizes = [file.file.size for file in missing]
            total = None if None in sizes else sum(size or 0 for size in sizes)
            meter = DownloadMeter(published.manifest.name, total, on_progress)
            # Until the image is complete, only this record protects the files that have arrived.
            await in_background(layout.write_record, published, pulling)
            try:
                async with open_client() as client:
                    while missing := await in_background(missing_files, published, layout):
                        for file in missing:
                            await fetch_file(layout, file, client, meter)
                await in_background(_note_use, layout, published)
            finally:
                await in_background(pulling.unlink, True)
        else:
            await in_background(_note_use, layout, published)

    async def hold(
        self,
        published: Published,
        data_dir: Path,
        on_progress: ProgressCallback | None,
        stack: ExitStack,
    ) -> Source:
        """Fetch an image for a VM in `data_dir`; keep the image until `stack` is closed.

        Raises:
            ImageError, HostError: See `pull()`.
        """
        while True:
            source = await self.fetch(published, on_progress)
            async with self._layout.locked():
                if _lock_files(source, stack):
                    await in_background(self._layout.note_data_dir, data_dir)
                    return source

    async def _locked(self, work: Callable[[], T]) -> T:
        with self._layout.opened():
            async with self._layout.locked():
                return await in_background(work)


async def _read_manifest(client: Any, location: Location) -> bytes:
    try:
        answer = await client.get_object(Bucket=location.bucket, Key=location.key)
        with closing(answer["Body"]) as body:
            return await read_at_most(body, MAX_MANIFEST + 1)
    except Exception as error:
        raise explain(error, location.uri) from error


def _as_cached(layout: Layout, image: ImageRecord) -> CachedImage:
    """Return the public description of an image."""
    manifest = image.published.manifest

    def path(file: ImageFile | None) -> Path | None:
        return None if file is None else layout.path_of(file)

    return CachedImage(
        uri=image.published.uri,
        name=manifest.name,
        os=manifest.os,
        size=sum(_size_of(layout.path_of(file)) for file in manifest.files.values()),
        pulled=image.pulled,
        used=image.used,
        disk=layout.path_of(manifest.rootfs),
        kernel=path(manifest.kernel),
        initrd=path(manifest.initrd),
    )


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _cached(layout: Layout, uri: str) -> ImageRecord | None:
    """Return the URI's complete image, preferably pulled from the current endpoint."""
    known = [image for image in layout.records() if image.published.uri == uri]
    known.sort(key=lambda image: image.published.endpoint != endpoint())
    return next((image for image in known if is_whole(layout, image)), None)


def _canonical(name_or_uri: object) -> str:
    if not isinstance(name_or_uri, str):
        raise ConfigError(f"name_or_uri={shown(name_or_uri)} is wrong: pass a str.")
    return parse_uri(name_or_uri).uri if is_published(name_or_uri) else name_or_uri


def _recorded(layout: Layout, published: Published) -> ImageRecord:
    """Return the record of an image just fetched, or a new one if the record was removed since."""
    path = layout.record_path(published.uri, published.endpoint)
    now = time.time()
    return layout.read_record(path) or ImageRecord(path, published, now, now)


def _source(layout: Layout, published: Published) -> Source:
    """Return the files that a guest boots from."""
    manifest = published.manifest
    rootfs = layout.path_of(manifest.rootfs)
    disk_format = manifest.rootfs.format or detect_format(rootfs)
    if manifest.kernel is None:
        return Source(rootfs, format=disk_format)
    initrd = layout.path_of(manifest.initrd) if manifest.initrd is not None else None
    boot_args = ROOT_DISK if manifest.boot_args is None else manifest.boot_args
    return Source(rootfs, layout.path_of(manifest.kernel), initrd, boot_args, disk_format)


def _note_use(layout: Layout, published: Published) -> None:
    """Write the image's record; if it is up to date, only set its time to now."""
    path = layout.record_path(published.uri, published.endpoint)
    known = layout.read_record(path)
    if known is not None and known.published == published:
        with suppress(OSError):  # another user's cache may be read-only
            os.utime(path)
    else:
        disk = published.manifest.rootfs
        try:
            # The cache may have had the file already, as a kernel or raw disk of another image.
            check_disk(layout.path_of(disk), "rootfs", disk, published.uri)
        except WrongContentError as error:
            raise ImageError(str(error)) from None
        layout.write_record(published, path)


def _lock_files(source: Source, stack: ExitStack) -> bool:
    """Open and lock the files that a guest boots from; return false if a file was just removed."""
    for path in source.paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        stack.callback(close_private, fd)
        try_lock(fd, shared=True)
    return True
