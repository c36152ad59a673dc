"""Files that appear at once and whole, whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path


def replace_file(
    path: str | Path,
    content: bytes,
    *,
    temporary: str | Path | None = None,
    mode: int = 0o666,
    dir_fd: int | None = None,
) -> None:
    """Write a file under a temporary name beside `path`, then rename it to `path`.

    A reader sees the old content or the new one, never a part. This does not wait for the disk: if
    the host itself crashes, the file may be empty. If it fails, the temporary file is removed.

    Args:
        path: Relative to `dir_fd`, if that is given.
        temporary: The temporary name, for a caller that removes it after a crash; by default a
            hidden name that no other process uses.
        mode: The file's permissions, less the umask.
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
    """Return the SHA-256 of a file, or of an open file from its position on, in hexadecimal."""
    with open(file, "rb", closefd=not isinstance(file, int)) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def seal(path: Path, mode: int) -> None:
    """Set a finished file's permissions and write it to the disk, before it gets its final name.

    Otherwise a crash of the host could leave the name without the content.
    """
    with path.open("rb") as file:
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
