"""Files and directories as lists, on either side: nothing is followed, nothing is trusted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from smolvm_async.errors import FileTransferError

if TYPE_CHECKING:
    from asyncssh import SFTPClient


class Entry(NamedTuple):
    """A file, a directory or a link of a tree.

    Attributes:
        path: Relative to the tree's root, with slashes; empty is the root itself.
        mode: As of stat(2).
        size: Bytes.
        mtime: Seconds since the epoch.
    """

    path: str
    mode: int
    size: int
    mtime: float

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a plain file."""
        return stat.S_ISREG(self.mode)


def local_tree(root: Path) -> list[Entry]:
    """What there is at and below a path here; a directory comes before what is in it.

    Raises:
        FileTransferError: If there is something that cannot be copied.
        OSError: If something cannot be read.
    """
    status = root.stat()  # the source itself may be a link
    top = Entry("", status.st_mode, status.st_size, status.st_mtime)
    below = _below(root, "") if top.is_directory else ()
    return [_checked(top, str(root)), *below]


def _below(root: Path, directory: str) -> Iterator[Entry]:
    with os.scandir(root / directory) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = f"{directory}/{entry.name}".lstrip("/")
        status = entry.stat(follow_symlinks=False)
        yield _checked(Entry(path, status.st_mode, status.st_size, status.st_mtime), entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _below(root, path)


async def guest_tree(sftp: SFTPClient, root: str) -> list[Entry]:
    """The same for the guest, whose names may be anything.

    Raises:
        FileTransferError: If a name could lead out of the tree, or something cannot be copied.
        asyncssh.SFTPError: If something cannot be read.
    """
    tree = [await _guest_entry(sftp, root)]
    pending = [""] if tree[0].is_directory else []
    seen = {""}
    while pending:
        directory = pending.pop()
        async for found in sftp.scandir(f"{root}/{directory}"):
            name = str(found.filename)
            if name in (".", ".."):
                continue
            path = f"{directory}/{name}".lstrip("/")
            if not name or "/" in name or "\0" in name or path in seen:
                raise FileTransferError(f"the guest names a file {name!r}, which is refused")
            seen.add(path)
            attrs = found.attrs
            mode, size = attrs.permissions or 0, attrs.size or 0
            entry = _checked(Entry(path, mode, size, attrs.mtime or 0), f"{root}/{path}")
            tree.append(entry)
            if entry.is_directory:
                pending.append(path)
    return tree


async def _guest_entry(sftp: SFTPClient, root: str) -> Entry:
    attrs = await sftp.stat(root)
    entry = Entry("", attrs.permissions or 0, attrs.size or 0, attrs.mtime or 0)
    return _checked(entry, root)


def _checked(entry: Entry, shown: str) -> Entry:
    if not (entry.is_directory or entry.is_file or entry.is_link):
        raise FileTransferError(
            f"{shown!r} is no file, directory or link (a socket, FIFO or device): it cannot be "
            "copied; remove it, or copy what is beside it"
        )
    return entry
