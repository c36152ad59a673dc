"""A file of the guest, as `list_files()` returns it."""

from __future__ import annotations

import stat
from typing import Literal, NamedTuple

FileKind = Literal["file", "directory", "link", "other"]
_KINDS: dict[int, FileKind] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
}


class FileInfo(NamedTuple):
    """A file of the guest. A link is a link, wherever it leads.

    Attributes:
        name: The name in its directory.
        path: The absolute path.
        kind: `file`, `directory`, `link`, or `other`: a socket, a FIFO or a device.
        size: The size in bytes.
        mode: The permissions, such as 0o644.
        modified: The time of the last modification, in seconds since the epoch.
    """

    name: str
    path: str
    kind: FileKind
    size: int
    mode: int
    modified: float


def kind_of(mode: int) -> FileKind:
    """Return the kind of a file by its `st_mode`, as in stat(2)."""
    return _KINDS.get(stat.S_IFMT(mode), "other")
