"""Files of an open directory: open them without following links, list, link and copy them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from smolvm_async.foundation.fork import private

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FICLONE = 0x40049409  # ioctl_ficlone(2): the copy shares its blocks with the original
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


def open_regular(name: str, dir_fd: int) -> int:
    """Open a file for reading; the caller closes the descriptor.

    Args:
        name: A name in the directory, or in a directory of this directory.

    Raises:
        OSError: The file cannot be opened; ELOOP: it is a link, or not a regular file.
    """
    directory, _, name = name.rpartition("/")
    if directory:
        parent = os.open(directory, DIRECTORY, dir_fd=dir_fd)
        try:
            return open_regular(name, parent)
        finally:
            os.close(parent)
    # Without O_NONBLOCK, opening a FIFO would hang.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(name, flags, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ELOOP, "it is not a regular file")
    return fd


def memory_file(name: str, flags: int = 0) -> int:
    """Create a file that exists only in memory, and return its descriptor. Forks lose it.

    `flags` are those of memfd_create(2).
    """
    try:
        return private(os.memfd_create(name, flags | os.MFD_CLOEXEC))
    except OSError as error:
        raise OSError(error.errno, f"memfd_create(2) failed: {error.strerror}") from error


def names_in(directory: str, dir_fd: int) -> list[str]:
    """Return the paths of the files in `directory`, relative to `dir_fd`; none if it is missing."""
    try:
        fd = os.open(directory, DIRECTORY, dir_fd=dir_fd)
    except FileNotFoundError:
        return []
    try:
        return [os.path.normpath(f"{directory}/{name}") for name in os.listdir(fd)]
    finally:
        os.close(fd)


def link_or_copy(source: int, name: str, dir_fd: int) -> None:
    """Give the open file `source` a second name; copy the file where a link is impossible."""
    try:
        os.link(f"/proc/self/fd/{source}", name, dst_dir_fd=dir_fd, follow_symlinks=True)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        copy(source, name, dir_fd)


def copy(source: int, name: str, dir_fd: int) -> None:
    """Copy the open file `source` to a new private file with the same times."""
    status = os.fstat(source)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    target = os.open(name, flags, 0o600, dir_fd=dir_fd)
    try:
        copy_content(source, target, status.st_size)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(target)


def copy_content(source: int, target: int, size: int) -> None:
    """Make the open file `target` equal to `source`, which has `size` bytes.

    Share the blocks, if the file system can do so; or else leave the holes out.
    """
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, FICLONE, source)
        return
    os.ftruncate(target, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # the rest of the file is a hole
        end = os.lseek(source, start, os.SEEK_HOLE)
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            sent = os.sendfile(target, source, start, end - start)
            if not sent:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            start += sent
