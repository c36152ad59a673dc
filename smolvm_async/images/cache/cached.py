"""An image of the cache, as people see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smolvm_async.images.cache.layout import Layout, Pulled
from smolvm_async.images.manifest import ImageFile


@dataclass(frozen=True)
class CachedImage:
    """A published image on this machine.

    Attributes:
        uri: Of its manifest.
        name: What it is called.
        os: The guest OS.
        size: Bytes of its files, of which other images may have some too.
        pulled: When it was downloaded, in seconds since the epoch.
        used: When it was last pulled or booted.
        disk: The disk's file; `kernel` and `initrd` likewise, where it has them.
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


def as_cached(layout: Layout, image: Pulled) -> CachedImage:
    """What is shown of an image."""
    manifest = image.published.manifest

    def path(file: ImageFile | None) -> Path | None:
        return None if file is None else layout.path_of(file)

    return CachedImage(
        uri=image.published.uri,
        name=manifest.name,
        os=manifest.os,
        size=sum(_size(layout.path_of(file)) for file in manifest.files.values()),
        pulled=image.pulled,
        used=image.used,
        disk=layout.path_of(manifest.rootfs),
        kernel=path(manifest.kernel),
        initrd=path(manifest.initrd),
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
