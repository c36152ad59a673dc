"""Local files that a VM boots from: open, check and inspect them.

A base image is opened once. QEMU inherits the descriptor that was checked, so nobody can exchange
the file between the check and its use.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from smolvm_async.config.source import LocalDisk, Source
from smolvm_async.errors import ImageError
from smolvm_async.foundation.files import remembered
from smolvm_async.foundation.fork import close_private, private
from smolvm_async.foundation.process import run
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.images import qcow2

ROOT_DISK = "console=ttyS0 root=/dev/vda rw"  # the default command line of a kernel

ELF = b"\x7fELF"  # magic of an uncompressed kernel; QEMU starts it by its PVH note
BZIMAGE, BZIMAGE_AT = b"HdrS", 0x202  # magic and its offset: Documentation/arch/x86/boot.rst
INITRAMFS = (b"0707", b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # cpio, gzip, zstd: the usual ones
BOOT_CODE = 440  # bytes of BIOS code in the first sector; a disk for UEFI has zeros there
SECTOR = 512  # bytes
UNFINISHED = (".part", ".partial", ".crdownload", ".opdownload", ".download", ".aria2", ".!qB")


class BaseImage(NamedTuple):
    """An open, checked base image."""

    path: Path
    fd: int  # read-only; QEMU inherits the descriptor and never opens the path itself
    virtual_size: int  # bytes of the disk that the guest sees
    size: int  # bytes of the file
    mtime_ns: int  # time of the last change, in nanoseconds since the epoch


@contextmanager
def open_image(
    path: Path, disk_format: str = "qcow2", *, layer: bool = False
) -> Iterator[BaseImage]:
    """Open and check a base image (see `smolvm_async.images.qcow2`).

    Args:
        disk_format: `qcow2`, or `raw` if the manifest says so.
        layer: Whether this is a layer of a snapshot, which gets a hard link for each clone.
    """
    with open_plain(path, "image", "a qcow2 file") as fd:
        status = os.fstat(fd)
        try:
            size = check_disk(fd, str(path), disk_format, layer=layer)
        except qcow2.Qcow2Error as error:
            raise ImageError(f"image {str(path)!r} {error}.") from None
        except OSError as error:
            raise ImageError(f"image {str(path)!r} cannot be read: {error.strerror}.") from None
        yield BaseImage(path, fd, size, status.st_size, status.st_mtime_ns)


def check_disk(fd: int, name: str, disk_format: str, *, layer: bool = False) -> int:
    """Check an open disk, and return its virtual size in bytes.

    A raw disk has no header to check: it is refused only if it certainly is something else.

    Args:
        name: The disk's path, for commands in messages.
        layer: See `open_image()`.

    Raises:
        Qcow2Error: The disk cannot be used; the message continues a sentence that begins with the
            disk's name.
    """
    if disk_format == "raw":
        if reason := _other_kind(fd, name, "raw"):
            raise qcow2.Qcow2Error(reason)
        return -(-os.fstat(fd).st_size // SECTOR) * SECTOR
    try:
        return _size_of_layer(fd) if layer else _size_of_image(fd)
    except qcow2.Qcow2Error as error:
        raise qcow2.Qcow2Error(_other_kind(fd, name, "qcow2") or error) from None


def _other_kind(fd: int, name: str, use: str) -> str | None:
    from smolvm_async.images.kinds import problem  # most files are right, and never need the table

    return problem(fd, name, use)


def _virtual_size(fd: int) -> int:
    return qcow2.check(fd).virtual_size


_size_of_image = remembered(_virtual_size)  # a fleet checks its image only once
_size_of_layer = remembered(_virtual_size, linked=True)  # each clone links its layers


@contextmanager
def open_plain(path: Path, argument: str, wanted: str) -> Iterator[int]:
    """Open a plain file for reading, and yield its descriptor.

    Args:
        argument: The name of the user's argument, for messages.
        wanted: The kind of file to pass, for messages, such as "a qcow2 file".
    """
    named = f"{argument} {str(path)!r}"
    try:
        # Without O_NONBLOCK, opening a FIFO would hang.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ImageError(f"{named} {_missing(path)}.") from None
    except PermissionError:
        raise ImageError(
            f"{named} cannot be read by this user: give read permission to it, "
            "and execute permission to its directories."
        ) from None
    except OSError as error:
        with suppress(OSError):
            _check_regular(path, path.stat().st_mode, f"{named} cannot be opened, and", wanted)
        raise ImageError(
            f"{named} cannot be opened ({error.strerror}): pass the path of {wanted}."
        ) from None
    try:
        _check_regular(path, os.fstat(fd).st_mode, named, wanted)
        if evidence := _unfinished(path):
            raise ImageError(
                f"{named} is an unfinished download, since {evidence}: finish the download, or "
                "rename the file if it is complete."
            )
        yield private(fd)  # QEMU's locks are on the open file, which it inherits
    finally:
        close_private(fd)


def _missing(path: Path) -> str:
    if not path.is_symlink():
        return "does not exist: check the path"
    target = os.readlink(path)
    cure = "get it with git annex get" if "annex/objects/" in target else "check the link"
    return f"is a link to {target!r}, which does not exist: {cure}"


def _check_regular(path: Path, mode: int, subject: str, wanted: str) -> None:
    if not stat.S_ISREG(mode):
        from smolvm_async.images.kinds import irregular

        raise ImageError(f"{subject} {irregular(path, mode, wanted)}.")


def _unfinished(path: Path) -> str:
    """Return the evidence that a download is unfinished: the gaps in it may be read as zeros."""
    if path.suffix in UNFINISHED:
        return f"its name ends in {path.suffix}"
    control = path.with_name(f"{path.name}.aria2")
    return f"{control.name!r} is beside it" if control.exists() else ""


def own_source(disk: LocalDisk) -> Source:
    """Check the files that the user passed, and return them."""
    source = Source(disk.path)
    if disk.kernel is not None:
        boot_args = ROOT_DISK if disk.boot_args is None else disk.boot_args
        source = Source(disk.path, disk.kernel, disk.initrd, boot_args)
        with open_kernel(disk.kernel):
            pass
    if source.initrd is not None:
        with open_initrd(source.initrd):
            pass
    with open_image(source.image):
        pass
    return source


@contextmanager
def open_kernel(path: Path) -> Iterator[int]:
    """Open a Linux kernel for QEMU, check its magic, and yield the descriptor."""
    with open_plain(path, "kernel", "a Linux kernel") as fd:
        try:
            begin = os.pread(fd, BZIMAGE_AT + len(BZIMAGE), 0)
        except OSError as error:
            raise ImageError(f"kernel {str(path)!r} cannot be read: {error.strerror}.") from error
        if not begin.startswith(ELF) and begin[BZIMAGE_AT:] != BZIMAGE:
            reason = _other_kind(fd, str(path), "kernel") or (
                "is not a Linux kernel for x86-64: pass a bzImage, such as /boot/vmlinuz-*, or an "
                "uncompressed vmlinux"
            )
            raise ImageError(f"kernel {str(path)!r} {reason}.")
        yield fd


@contextmanager
def open_initrd(path: Path) -> Iterator[int]:
    """Open an initramfs for QEMU, unless it certainly is something else; yield the descriptor."""
    with open_plain(path, "initrd", "an initramfs") as fd:
        known = os.pread(fd, 4, 0).startswith(INITRAMFS)
        if not known and (reason := _other_kind(fd, str(path), "initrd")):
            raise ImageError(f"initrd {str(path)!r} {reason}.")
        yield fd


async def starts_by_bios(qemu_img: Path, fd: int, disk_format: str) -> bool:
    """Return whether the first sector of an open disk has BIOS boot code; if not, UEFI boots it."""
    if disk_format == "qcow2":
        sector = await in_thread(qcow2.first_sector, fd)
    else:
        sector = await in_thread(os.pread, fd, BOOT_CODE, 0)
    if sector is None:
        sector = await _read_by_qemu(qemu_img, fd)
    return any(sector[:BOOT_CODE])


async def _read_by_qemu(qemu_img: Path, fd: int) -> bytes:
    sector = os.memfd_create("sector", os.MFD_CLOEXEC)
    try:
        # `-U`: if another program has the image open for writing, QEMU's launch tells the user.
        # Not /proc/PID/fd: only root may read the one of a process that is not dumpable.
        ends = (f"if=/proc/self/fd/{fd}", f"of=/proc/self/fd/{sector}")
        words = ("dd", "-U", "-f", "qcow2", "-O", "raw", "bs=512", "count=1", *ends)
        await run([qemu_img, *words], fds=[fd, sector])
        return os.pread(sector, BOOT_CODE, 0)
    finally:
        os.close(sector)
