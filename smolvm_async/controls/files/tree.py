"""The list of a file or a directory with all its contents, from either side of a transfer."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_IFDIR, S_IFLNK, S_IFREG
from typing import NamedTuple

from smolvm_async.errors import FileTransferError


class Entry(NamedTuple):
    """A file, a directory or a link of a tree.

    Attributes:
        path: The path relative to the tree's root, with slashes; empty for the root itself.
        mode: Type and permissions, as in stat(2).
        size: The size in bytes.
        mtime: The time of the last modification, in seconds since the epoch.
    """

    path: str
    mode: int
    size: int
    mtime: float

    @property
    def kind(self) -> int:
        """The type of the file, as in stat(2), such as `S_IFDIR`."""
        return stat.S_IFMT(self.mode)


def local_tree(root: Path) -> list[Entry]:
    """List a file or a directory of this host; a directory comes before its contents."""
    status = root.stat()  # the source itself may be a link
    top = Entry("", status.st_mode, status.st_size, status.st_mtime)
    below = _below(root, "") if top.kind == S_IFDIR else ()
    return [checked(top, str(root)), *below]


def _below(root: Path, directory: str) -> Iterator[Entry]:
    with os.scandir(root / directory) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = f"{directory}/{entry.name}".lstrip("/")
        status = entry.stat(follow_symlinks=False)
        yield checked(Entry(path, status.st_mode, status.st_size, status.st_mtime), entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _below(root, path)


def checked(entry: Entry, shown: str) -> Entry:
    """Return `entry`; refuse sockets, FIFOs and devices."""
    if entry.kind not in (S_IFDIR, S_IFREG, S_IFLNK):
        raise FileTransferError(
            f"{shown!r} cannot be copied: it is not a file, directory or link, but a socket, FIFO "
            "or device; remove it, or copy the other files one by one"
        )
    return entry


def size_of(tree: Sequence[Entry]) -> int:
    """Return the bytes of all files of a tree."""
    return sum(entry.size for entry in tree if entry.kind == S_IFREG)
