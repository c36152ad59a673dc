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
    """A qcow2 of the user's, and the kernel if QEMU is to load one; all paths are absolute.

    Attributes:
        path: The qcow2.
        kernel: A Linux kernel, instead of the image's boot loader.
        initrd: The kernel's initramfs.
        boot_args: The kernel's command line; `None` is the default of this library.
    """

    path: Path
    kernel: Path | None = None
    initrd: Path | None = None
    boot_args: str | None = None


@dataclass(frozen=True)
class PublishedImage:
    """An image in S3. Its manifest, which is read at the start, tells the guest OS.

    Attributes:
        uri: The URI of the manifest.
    """

    uri: str


Origin = BuiltInImage | LocalDisk | PublishedImage


def make_origin(
    image: str, kernel: str = "", initrd: str = "", boot_args: str | None = None
) -> Origin:
    """Return the origin that a VM's record describes.

    Args:
        image: Empty, an absolute path, or the URI of a manifest.
        kernel: An absolute path, or empty.
        initrd: Likewise.
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
    """The files that a guest starts from, as absolute paths. They exist.

    Attributes:
        image: The disk.
        kernel: The kernel that QEMU loads; `None` if the image has a boot loader.
        initrd: The kernel's initramfs, or `None`.
        boot_args: The kernel's command line.
        format: The disk's format: `qcow2`, or `raw` if the manifest of a published image says so.
    """

    image: Path
    kernel: Path | None = None
    initrd: Path | None = None
    boot_args: str = ""
    format: str = "qcow2"
