"""Remove images from the cache by name, age or size, and remove damaged or unneeded files.

A file is kept while something needs it:

- an image whose record is in the cache, or an image that is being downloaded (`.pulling`);
- a VM that is starting or running: it holds a shared lock on the file;
- a kept VM that is stopped: its record, in a data directory that the cache knows, names the file;
- a snapshot in such a data directory, likewise.

Every function runs in a thread. The caller holds the cache's lock, so no VM can start meanwhile.
Only `files_of()` and `actual_digest()` do not need the lock; they may take long.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from smolvm_async.errors import ImageError
from smolvm_async.foundation.files import sha256_of
from smolvm_async.foundation.locking import LockFile, try_lock
from smolvm_async.images.cache.layout import MTIME, ImageRecord, Layout
from smolvm_async.state.record import Machine
from smolvm_async.state.registry import survey
from smolvm_async.state.snapshots import SNAPSHOTS, survey_snapshots
from smolvm_async.state.status import ACTIVE, Status

PULLING = ".pulling"  # suffix of the record of an image that is being downloaded
LONGEST_PULL = 86_400.0  # seconds; an older record was left by a process that died


class Damage(NamedTuple):
    """A damaged file of the cache.

    Attributes:
        path: The file.
        expected: The SHA-256 that it should have.
        actual: The SHA-256 that it has; "" if the file is missing.
        removed: Whether the file was removed; if so, the next pull downloads it again. A file that
            a VM needs is kept.
    """

    path: Path
    expected: str
    actual: str
    removed: bool


def paths_of(layout: Layout, image: ImageRecord) -> set[Path]:
    """Return the files of an image."""
    return {layout.path_of(file) for file in image.published.manifest.files.values()}


def is_whole(layout: Layout, image: ImageRecord) -> bool:
    """Return whether all files of an image are in the cache."""
    return all(layout.holds(file) for file in image.published.manifest.files.values())


def find_images(layout: Layout, name_or_uri: str) -> list[ImageRecord]:
    """Return the images with that name or URI; raise if none exists."""
    images = list(layout.records())
    matches = [
        image
        for image in images
        if name_or_uri in (image.published.uri, image.published.manifest.name)
    ]
    if not matches:
        names = ", ".join(sorted({image.published.manifest.name for image in images})) or "none"
        raise ImageError(
            f"There is no image {name_or_uri!r} in {str(layout.root)!r}: pass a name or a URI that "
            f"list() shows. Names in the cache: {names}."
        )
    return matches


def remove_images(layout: Layout, images: Collection[ImageRecord]) -> None:
    """Remove images, and those of their files that no other image uses.

    If a VM needs one of the images, raise an `ImageError` and remove nothing.
    """
    using = uses(layout)
    for image in images:
        if users := _users(layout, image, images, using):
            raise ImageError(
                f"{image.published.manifest.name} ({image.published.uri}) is in use by "
                f"{', '.join(users)}: stop every VM that uses the image (delete() a kept VM, and "
                "delete_snapshot() a snapshot), and try again."
            )
    for image in images:
        _remove(layout, image)


def _users(
    layout: Layout, image: ImageRecord, removing: Collection[ImageRecord], using: list[Use]
) -> list[str]:
    """Return the users of an image, or of one of its files that no remaining image uses."""
    records = {other.path for other in removing}
    staying = {
        path
        for other in layout.records()
        if other.path not in records
        for path in paths_of(layout, other)
    }
    unshared = paths_of(layout, image) - staying
    users = users_of(unshared, image.published.uri, using)
    if not users and any(is_held(path) for path in unshared):
        users = ["a VM"]
    return users


def _remove(layout: Layout, image: ImageRecord) -> None:
    image.path.unlink(missing_ok=True)
    for path in paths_of(layout, image) - _needed(layout):
        path.unlink(missing_ok=True)


def _needed(layout: Layout) -> set[Path]:
    """Return the files of all images, including images that are being downloaded."""
    images = [*layout.records(), *_pulling(layout)]
    return {path for image in images for path in paths_of(layout, image)}


def _pulling(layout: Layout) -> Iterator[ImageRecord]:
    for path in layout.images.glob(f"*{PULLING}"):
        image = layout.read_record(path)
        if image is not None and time.time() - image.used < LONGEST_PULL:
            yield image
        else:
            path.unlink(missing_ok=True)


def remove_old(
    layout: Layout, max_bytes: int | None, unused_since: float | None
) -> list[ImageRecord]:
    """Remove old images, then the least recently used images until the rest is small enough.

    Return the removed images. Images that a VM needs are kept. Unneeded files and partial
    downloads are removed as well.

    Args:
        max_bytes: The total size, in bytes, that all files may have.
        unused_since: An image last used before this time is old; in seconds since the epoch.
    """
    using = uses(layout)
    _remove_unneeded(layout, using)
    removed = []
    for image in reversed(list(layout.records())):  # the least recently used first
        old = unused_since is not None and image.used < unused_since
        large = max_bytes is not None and _size(layout) > max_bytes
        if (old or large) and not _users(layout, image, [image], using):
            _remove(layout, image)
            removed.append(image)
    return removed


def _size(layout: Layout) -> int:
    return sum(path.stat().st_size for path in layout.files.iterdir())


def _remove_unneeded(layout: Layout, using: list[Use]) -> None:
    needed = _needed(layout)
    for path in set(layout.files.iterdir()) - needed:
        if not users_of({path}, "", using) and not is_held(path):
            path.unlink(missing_ok=True)
    for digest in {path.name.partition(".")[0] for path in layout.arriving.iterdir()}:
        name = f"{digest}.lock"
        lock = LockFile(layout.arriving / name)
        if lock.try_lock():  # no process is downloading this file
            for path in layout.arriving.glob(f"{digest}.*"):
                if path.name != name:
                    path.unlink(missing_ok=True)
            lock.unlock()


def files_of(layout: Layout, name_or_uri: str | None) -> list[Path]:
    """Return the files of an image, or of all images."""
    images = list(layout.records()) if name_or_uri is None else find_images(layout, name_or_uri)
    return sorted({path for image in images for path in paths_of(layout, image)})


def actual_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or "" if it is missing.

    If the digest is right, also correct the file's time, which may be wrong.
    """
    try:
        actual = sha256_of(path)
    except FileNotFoundError:
        return ""
    if actual == path.name:
        with contextlib.suppress(OSError):  # the cache may be read-only
            os.utime(path, (MTIME, MTIME))
    return actual


def remove_damaged(layout: Layout, path: Path, actual: str) -> Damage:
    """Remove a file with a wrong digest, unless a VM needs it; describe the damage."""
    in_use = bool(users_of({path}, "", uses(layout))) or is_held(path)
    if not in_use:
        path.unlink(missing_ok=True)
    return Damage(path, path.name, actual, removed=not in_use)


# The VMs and snapshots that need a file


class Use(NamedTuple):
    """A VM or a snapshot that needs files of the cache."""

    user: str  # the VM's id, or `snapshot NAME`
    paths: set[Path]  # the files that its record names
    uri: str  # the URI of a running VM's image; empty for a stopped VM


def uses(layout: Layout) -> list[Use]:
    """Return the users of files of the cache, from all data directories that the cache knows."""
    found = []
    for data_dir in layout.known_data_dirs():
        for record, status in survey(data_dir):
            running = status in (*ACTIVE, Status.ELSEWHERE)
            if running or record.machine is not None:
                uri = record.config.image if running else ""
                found.append(Use(record.config.vm_id, _paths_of(record.machine), uri))
        for snapshot, info in survey_snapshots(data_dir / SNAPSHOTS):
            found.append(Use(f"snapshot {info.name}", _paths_of(snapshot.machine), ""))
    return found


def _paths_of(machine: Machine | None) -> set[Path]:
    source = machine.source if machine is not None else None
    return set(source.paths) if source is not None else set()


def users_of(paths: set[Path], uri: str, found: list[Use]) -> list[str]:
    """Return the users that need one of the files, or run the image of the URI."""
    return sorted({use.user for use in found if use.paths & paths or use.uri == uri})


def is_held(path: Path) -> bool:
    """Return whether QEMU, or a VM that is starting, holds a lock on the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    with contextlib.closing(os.fdopen(fd, "rb")):
        return not try_lock(fd)
