"""The origin of a VM's disk: as the arguments give it, and as files that QEMU can open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from smolvm_async.config.uri import is_published


@dataclass(frozen=True)
class BuiltInImage:
    """The image that this library builds itself, at its first use."""


@dataclass(frozen=True)
class LocalDisk:
    """A qcow2 of the user's, and the kernel if QEMU is to load one; all paths are absolute."""

    path: Path
    kernel: Path | None = None  # instead of the image's boot loader
    initrd: Path | None = None
    boot_args: str | None = None  # the kernel's command line; `None` is this library's default


@dataclass(frozen=True)
class PublishedImage:
    """An image in S3. Its manifest, which is read at the start, tells the guest OS."""

    uri: str  # of the manifest


Origin = BuiltInImage | LocalDisk | PublishedImage


def make_origin(
    image: str, kernel: str = "", initrd: str = "", boot_args: str | None = None
) -> Origin:
    """Return the origin that a VM's record describes; absent values are empty.

    Args:
        image: Empty, an absolute path, or the URI of a manifest.
    """
    if not image:
        return BuiltInImage()
    if is_published(image):
        return PublishedImage(image)
    return LocalDisk(
        Path(image),
        Path(kernel) if kernel else None,
        Path(initrd) if initrd else None,
        boot_args,
    )


class Source(NamedTuple):
    """The files that a guest starts from, as absolute paths. They exist."""

    image: Path  # the disk
    kernel: Path | None = None  # for QEMU to load; `None` if the image has a boot loader
    initrd: Path | None = None
    boot_args: str = ""  # the kernel's command line
    format: str = "qcow2"  # of the disk; `raw` if the manifest of a published image says so

    @property
    def paths(self) -> list[Path]:
        """Return the paths of all files."""
        return [path for path in (self.image, self.kernel, self.initrd) if path is not None]
