"""The file systems of this host: which one holds a file, how it is mounted, and its free space."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20
MOUNTS = Path("/proc/self/mountinfo")


class FileSystem(NamedTuple):
    """A mounted file system.

    Attributes:
        mount: The mount point.
        kind: The type, such as `ext4` or `nfs4`; empty if /proc does not tell it.
        options: The options of the mount, such as `noexec`.
        free: The bytes that this user can still write; `None` if it does not answer.
    """

    mount: Path
    kind: str = ""
    options: tuple[str, ...] = ()
    free: int | None = None

    @property
    def name(self) -> str:
        """The name for messages."""
        return f"the file system on {self.mount}{f' ({self.kind})' if self.kind else ''}"

    def __str__(self) -> str:
        free = "" if self.free is None else f", which has {self.free / MIB:.1f} MiB free,"
        return f"{self.name}{free}"


def find_file_system(path: Path, mounts: Path = MOUNTS) -> FileSystem:
    """Return the file system of a path, which need not exist. A dead server makes this hang."""
    path = Path(os.path.realpath(path))
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        space = os.statvfs(path)
        free = space.f_bavail * space.f_frsize
    except OSError:
        free = None
    mount = path
    while not os.path.ismount(mount):
        mount = mount.parent
    kind, options = "", tuple[str, ...]()
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:  # proc_pid_mountinfo(5); the last mount on a mount point hides the others
        own, _, rest = line.partition(" - ")
        _, _, _, _, where, flags, *_ = own.split()
        if re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), where) == str(mount):
            kind, options = rest.split()[0], tuple(flags.split(","))
    return FileSystem(mount, kind, options, free)
