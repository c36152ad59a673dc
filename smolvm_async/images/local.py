"""A base image on this machine, opened once: what was checked is what QEMU gets."""

from __future__ import annotations

import functools
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from smolvm_async.errors import ImageError
from smolvm_async.images import qcow2

SECTOR = 512  # bytes
SETTLED = 1_000_000_000  # nanoseconds after a change


class BaseImage(NamedTuple):
    """An open, checked base image.

    Attributes:
        path: Where it is.
        fd: Open for reading only; QEMU inherits it and never opens the path itself.
        virtual_size: Bytes of the disk that the guest sees.
        size: Bytes of the file.
        mtime_ns: When it was last written to, in nanoseconds since the epoch.
    """

    path: Path
    fd: int
    virtual_size: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class _File:
    """An open file, as it was when it was last changed."""

    fd: int = field(compare=False)
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def _virtual_size(fd: int, status: os.stat_result) -> int:
    file = _File(
        fd,
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    if time.time_ns() - status.st_ctime_ns < SETTLED:  # the next change may show the same time
        return _check.__wrapped__(file)
    return _check(file)


@functools.lru_cache(maxsize=64)  # the VMs of a fleet share it; errors are not kept
def _check(file: _File) -> int:
    return qcow2.check(file.fd).virtual_size


@contextmanager
def open_image(path: Path, disk_format: str = "qcow2") -> Iterator[BaseImage]:
    """Open and check a base image.

    Args:
        disk_format: `raw` if its manifest says so: then there is no header to be checked.

    Raises:
        ImageError: If it is missing, not a plain file, unreadable, or a qcow2 that QEMU must
            not see (see `smolvm_async.images.qcow2`).
    """
    with open_plain(path, "image", "a qcow2 file") as fd:
        status = os.fstat(fd)
        size = -(-status.st_size // SECTOR) * SECTOR
        try:
            if disk_format != "raw":
                size = _virtual_size(fd, status)
        except qcow2.Qcow2Error as error:
            raise ImageError(f"image {str(path)!r} {error}.") from None
        except OSError as error:
            raise ImageError(f"image {str(path)!r} cannot be read: {error.strerror}.") from None
        yield BaseImage(path, fd, size, status.st_size, status.st_mtime_ns)


@contextmanager
def open_plain(path: Path, argument: str, wanted: str) -> Iterator[int]:
    """Open a plain file for reading; yields the descriptor.

    Args:
        argument: Which of the user's arguments it is, for messages.
        wanted: What it should be: "a qcow2 file".

    Raises:
        ImageError: If it is missing, not a plain file or unreadable.
    """
    named = f"{argument} {str(path)!r}"
    try:
        # Without O_NONBLOCK the open of a FIFO would hang.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ImageError(f"{named} does not exist: check the path.") from None
    except PermissionError:
        raise ImageError(
            f"{named} cannot be read by this user: give read permission to it, "
            "and execute permission to its directories."
        ) from None
    except OSError as error:
        raise ImageError(
            f"{named} cannot be opened ({error.strerror}): pass the path of {wanted}."
        ) from None
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            file = wanted.partition(" ")[2]
            raise ImageError(f"{named} is a directory: pass the {file} inside it.")
        if not stat.S_ISREG(mode):
            raise ImageError(f"{named} is not a plain file: pass {wanted}.")
        yield fd
    finally:
        os.close(fd)
