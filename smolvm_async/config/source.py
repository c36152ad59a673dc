"""The origin of a VM's disk in two forms: as in the arguments, and as files for QEMU."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from smolvm_async.config.uri import is_published


class BuiltInImage(NamedTuple):
    """The image that this library builds itself, on first use."""


class LocalDisk(NamedTuple):
    """The user's qcow2, and a kernel if QEMU has to load it itself; all paths are absolute."""

    path: Path
    kernel: Path | None = None  # instead of the image's boot loader
    initrd: Path | None = None
    boot_args: str | None = None  # the kernel's command line; `None` means this library's default


class PublishedImage(NamedTuple):
    """An image in S3. Its manifest names the guest OS, and is read when the VM starts."""

    uri: str  # the manifest's URI


Origin = BuiltInImage | LocalDisk | PublishedImage


def make_origin(
    image: str, kernel: str = "", initrd: str = "", boot_args: str | None = None
) -> Origin:
    """Return the origin that a VM's record describes; missing values are empty.

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
    """The absolute paths of the files that a guest starts from. The files exist."""

    image: Path  # the disk
    kernel: Path | None = None  # QEMU loads this kernel; `None` if the image has a boot loader
    initrd: Path | None = None
    boot_args: str = ""  # the kernel's command line
    format: str = "qcow2"  # the disk's format; a published image's manifest may say `raw`

    @property
    def paths(self) -> list[Path]:
        """Return the paths of all files."""
        return [path for path in (self.image, self.kernel, self.initrd) if path is not None]
