"""What goes from the cache: images by name, by age, by size; what is damaged; what nobody needs.

All of it is for a thread, and for whoever holds the cache's lock; only to read and compare digests,
which takes long, nobody has to.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from smolvm_async.errors import ImageError
from smolvm_async.foundation.locking import LockFile, try_lock
from smolvm_async.images.cache.layout import MTIME, Layout, Pulled
from smolvm_async.images.cache.reading import digest_of
from smolvm_async.state.record import ACTIVE, Record
from smolvm_async.state.registry import survey

PULLING = ".pulling"  # the suffix of what says which files are being downloaded for which image
LONGEST_PULL = 86_400.0  # seconds after which such a one was left by a dead process


class Damage(NamedTuple):
    """A file of the cache whose content is not what it was.

    Attributes:
        path: The file.
        expected: The SHA-256 that it had.
        actual: The one that it has; "" if the file is gone.
        removed: Whether it was removed, to be downloaded again; not if a VM needs it.
    """

    path: Path
    expected: str
    actual: str
    removed: bool


def paths_of(layout: Layout, image: Pulled) -> set[Path]:
    """The files of an image."""
    return {layout.path_of(file) for file in image.published.manifest.files.values()}


def is_whole(layout: Layout, image: Pulled) -> bool:
    """Whether all files of an image are there."""
    return all(layout.holds(file) for file in image.published.manifest.files.values())


def found(layout: Layout, name_or_uri: str) -> list[Pulled]:
    """The images that are meant.

    Raises:
        ImageError: If there is none.
    """
    images = list(layout.records())
    meant = [
        image
        for image in images
        if name_or_uri in (image.published.uri, image.published.manifest.name)
    ]
    if not meant:
        names = ", ".join(sorted({image.published.manifest.name for image in images})) or "none"
        raise ImageError(
            f"{name_or_uri!r} is no image in {str(layout.root)!r}: pass a name or a URI of those "
            f"that list() shows; their names: {names}."
        )
    return meant


def remove_images(layout: Layout, images: Collection[Pulled]) -> None:
    """Remove images, and those of their files that no other image has.

    Raises:
        ImageError: If a VM needs one; nothing was removed then.
    """
    using = uses(layout)
    for image in images:
        if users := _users(layout, image, images, using):
            raise ImageError(
                f"{image.published.manifest.name} ({image.published.uri}) is in use by "
                f"{', '.join(users)}: stop it, or delete() it if it is kept, and try again."
            )
    for image in images:
        _remove(layout, image)


def _users(
    layout: Layout, image: Pulled, leaving: Collection[Pulled], using: list[Use]
) -> list[str]:
    """Who needs an image, or a file that only the leaving images have."""
    staying = {
        path
        for other in layout.records()
        if other.path not in {one.path for one in leaving}
        for path in paths_of(layout, other)
    }
    going = paths_of(layout, image) - staying
    users = users_of(going, image.published.uri, using)
    if not users and any(is_held(path) for path in going):
        users = ["a VM"]
    return users


def _remove(layout: Layout, image: Pulled) -> None:
    image.path.unlink(missing_ok=True)
    for path in paths_of(layout, image) - _needed(layout):
        path.unlink(missing_ok=True)


def _needed(layout: Layout) -> set[Path]:
    """The files of all images, and of those that are being downloaded."""
    images = [*layout.records(), *_pulling(layout)]
    return {path for image in images for path in paths_of(layout, image)}


def _pulling(layout: Layout) -> Iterator[Pulled]:
    for path in layout.images.glob(f"*{PULLING}"):
        image = layout.read_record(path)
        if image is not None and time.time() - image.used < LONGEST_PULL:
            yield image
        else:
            path.unlink(missing_ok=True)


def remove_old(layout: Layout, max_bytes: int | None, unused_since: float | None) -> list[Pulled]:
    """Remove what is unused since a time, then the longest unused until the rest is small enough.

    What a VM needs stays. Besides, what nobody refers to goes: rests of downloads, of old images.

    Args:
        max_bytes: Of all files.
        unused_since: Seconds since the epoch.

    Returns:
        The images that are gone.
    """
    using = uses(layout)
    _remove_rests(layout, using)
    gone = []
    for image in reversed(list(layout.records())):  # the longest unused first
        old = unused_since is not None and image.used < unused_since
        large = max_bytes is not None and _size(layout) > max_bytes
        if (old or large) and not _users(layout, image, [image], using):
            _remove(layout, image)
            gone.append(image)
    return gone


def _size(layout: Layout) -> int:
    return sum(path.stat().st_size for path in layout.files.iterdir())


def _remove_rests(layout: Layout, using: list[Use]) -> None:
    needed = _needed(layout)
    for path in set(layout.files.iterdir()) - needed:
        if not users_of({path}, "", using) and not is_held(path):
            path.unlink(missing_ok=True)
    for digest in {path.name.partition(".")[0] for path in layout.arriving.iterdir()}:
        name = f"{digest}.lock"
        lock = LockFile(layout.arriving / name)
        if lock.try_lock():  # nobody downloads it now
            for path in layout.arriving.glob(f"{digest}.*"):
                if path.name != name:
                    path.unlink(missing_ok=True)
            lock.unlock()


def files_of(layout: Layout, name_or_uri: str | None) -> list[Path]:
    """The files of an image, or of all.

    Raises:
        ImageError: If there is no such image.
    """
    images = list(layout.records()) if name_or_uri is None else found(layout, name_or_uri)
    return sorted({path for image in images for path in paths_of(layout, image)})


def actual_digest(path: Path) -> str:
    """The SHA-256 of a file, or "" if it is gone.

    One that was only touched counts as there again.
    """
    try:
        actual = digest_of(path)
    except FileNotFoundError:
        return ""
    if actual == path.name:
        with suppress(OSError):  # the cache may be read-only
            os.utime(path, (MTIME, MTIME))
    return actual


def remove_damaged(layout: Layout, path: Path, actual: str) -> Damage:
    """Remove a file whose digest is wrong, unless a VM needs it."""
    in_use = bool(users_of({path}, "", uses(layout))) or is_held(path)
    if not in_use:
        path.unlink(missing_ok=True)
    return Damage(path, path.name, actual, removed=not in_use)


# Which VMs need a file: those that run hold a lock on it, kept ones have a record.


class Use(NamedTuple):
    """A VM that needs files of the cache.

    Attributes:
        vm_id: Its id.
        paths: The files.
        uri: Of the image that it was made from.
    """

    vm_id: str
    paths: frozenset[Path]
    uri: str


def uses(layout: Layout) -> list[Use]:
    """The VMs that need files of the cache, as far as their data directories are known."""
    found = []
    for data_dir in layout.known_data_dirs():
        for record, held in survey(data_dir):
            running = held and record.status in ACTIVE
            if running or record.machine is not None:
                uri = record.config.image if running else ""
                found.append(Use(record.config.vm_id, frozenset(_sources(record)), uri))
    return found


def _sources(record: Record) -> Iterator[Path]:
    if record.machine is not None and record.machine.source is not None:
        source = record.machine.source
        yield from (path for path in (source.image, source.kernel, source.initrd) if path)


def users_of(paths: set[Path], uri: str, found: list[Use]) -> list[str]:
    """The ids of VMs that need one of the files, or run from the URI."""
    return sorted({use.vm_id for use in found if use.paths & paths or use.uri == uri})


def is_held(path: Path) -> bool:
    """Whether QEMU, or a VM that is just starting, holds a lock on the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    with contextlib.closing(os.fdopen(fd, "rb")):
        return not try_lock(fd)
