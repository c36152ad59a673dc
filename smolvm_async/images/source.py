"""The user's own disk and kernel, checked, opened and looked into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from smolvm_async.config.source import LocalDisk, Source
from smolvm_async.errors import ImageError
from smolvm_async.foundation.process import run
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.images import qcow2
from smolvm_async.images.local import open_image, open_plain

ROOT_DISK = "console=ttyS0 root=/dev/vda rw"  # the default arguments of a kernel

ELF = b"\x7fELF"  # an uncompressed kernel, which QEMU starts at its PVH note
BZIMAGE, BZIMAGE_AT = b"HdrS", 0x202  # Documentation/arch/x86/boot.rst
BOOT_CODE = 440  # bytes of the first sector; UEFI leaves them at 0


def own_source(disk: LocalDisk) -> Source:
    """Return the files of the user's arguments, checked."""
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
    """Open a Linux kernel for QEMU; yields the descriptor."""
    with open_plain(path, "kernel", "a Linux kernel") as fd:
        begin = os.pread(fd, BZIMAGE_AT + len(BZIMAGE), 0)
        if not begin.startswith(ELF) and begin[BZIMAGE_AT:] != BZIMAGE:
            raise ImageError(
                f"kernel {str(path)!r} is not a Linux kernel for x86-64: pass a bzImage, such as "
                "/boot/vmlinuz-*, or an uncompressed vmlinux."
            )
        yield fd


def open_initrd(path: Path) -> AbstractContextManager[int]:
    """Open an initramfs for QEMU."""
    return open_plain(path, "initrd", "an initramfs")


async def starts_by_bios(qemu_img: Path, fd: int, disk_format: str) -> bool:
    """Return whether the first sector of an open disk has code for a BIOS; if not, UEFI boots."""
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
        ends = (f"if=/proc/{os.getpid()}/fd/{fd}", f"of=/proc/{os.getpid()}/fd/{sector}")
        await run([qemu_img, "dd", "-f", "qcow2", "-O", "raw", "bs=512", "count=1", *ends])
        return os.pread(sector, BOOT_CODE, 0)
    finally:
        os.close(sector)
