"""Files: atomic writes, and facts about unchanged files.

A killed process leaves no partial file under the final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SETTLED = 1_000_000_000  # nanoseconds; two changes further apart always have different times
MOST = 64  # files to remember the results of one function for


def make_private(path: Path) -> None:
    """Create a directory and its missing parents with mode 0700; leave existing ones as they are.

    `Path.mkdir(mode=0o700, parents=True)` would apply the mode to the last directory only.
    """
    for directory in (*reversed(path.parents), path):
        if directory == path or not directory.exists():
            directory.mkdir(mode=0o700, exist_ok=True)


def replace_file(
    path: str | Path,
    content: bytes,
    *,
    temporary: str | Path | None = None,
    mode: int = 0o644,
    dir_fd: int | None = None,
) -> None:
    """Write a file under a temporary name beside `path`, then rename it to `path`.

    A reader sees the whole old or the whole new content. This function does not wait for the disk:
    if the host crashes, the file may be empty. On an error, it removes the temporary file.

    Args:
        path: The final name; relative to `dir_fd` if `dir_fd` is given.
        temporary: The temporary name, if the caller wants to remove the file after a crash; by
            default, a hidden name that no other process uses.
        mode: The file's permissions before the umask is applied.
    """
    new = temporary or Path(path).with_name(f".{os.urandom(8).hex()}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(new, flags, mode, dir_fd=dir_fd), "wb") as file:
            file.write(content)
        os.replace(new, path, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=dir_fd)
        raise


def sha256_of(file: Path | int) -> str:
    """Return a file's SHA-256 in hexadecimal; read an open file from its current position."""
    with open(file, "rb", closefd=not isinstance(file, int)) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def seal(path: Path, mode: int) -> None:
    """Set a finished file's permissions and flush it to the disk; call this before renaming it.

    Otherwise, a crash of the host could leave an empty file under the final name.
    """
    with path.open("rb") as file:
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def remembered(function: Callable[[int], T], *, linked: bool = False) -> Callable[[int], T]:
    """Return a function that remembers what `function` returns for open files that do not change.

    Args:
        function: Returns a fact about the content of an open file.
        linked: Whether the files get hard links, which change their ctime. Then the file's mtime
            shows a change, although the file's owner can set mtime back.
    """
    results: dict[tuple[int, ...], T] = {}

    def find(fd: int) -> T:
        status = os.fstat(fd)
        changed = status.st_mtime_ns if linked else status.st_ctime_ns
        if time.time_ns() - changed < SETTLED:  # another change could get the same time
            return function(fd)
        key = (status.st_dev, status.st_ino, status.st_size, changed)
        if key not in results:
            if len(results) == MOST:
                results.clear()
            results[key] = function(fd)
        return results[key]

    return find
