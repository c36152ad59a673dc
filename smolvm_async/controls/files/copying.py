"""The transfer of a file or a directory, into the guest or out of it.

A transfer has three steps, which are the same in both directions:

1. List the source as `Entry` objects. Links are not followed, and the names that a guest reports
   are checked: a guest could report `../../etc/passwd`.
2. Copy everything under a temporary name in the directory of the target. First make the directories
   with mode 0700, so that even a read-only directory can receive its files. Then copy the files,
   several at a time. Then make the links, so that no file is written through a link. At the end,
   set the modes and times of the directories.
3. Publish: rename to the final name. Both names are in one directory, so on one file system, and
   the rename is atomic: a reader of the final name finds the old file or the whole new file, never
   a part. An existing directory may hold other files, so it is not replaced: the copy is merged
   into it, with one rename for each file.

If a step fails or is cancelled, the caller removes the temporary copy (`discard()`). Then no
partial file is left, only files that a merge has already renamed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from stat import S_IFDIR, S_IFLNK, S_IFREG
from typing import Any, Protocol, TypeVar

import anyio

from smolvm_async.controls.files.tree import Entry
from smolvm_async.errors import FileTransferError
from smolvm_async.foundation.progress import Meter, ProgressCallback
from smolvm_async.foundation.tasks import acquired, in_background

AT_A_TIME = 16  # files to copy at a time, and blocks of each file

T = TypeVar("T")


class TransferMeter(Meter):
    """A meter that reports how many bytes of the files are copied."""

    def __init__(
        self, callback: ProgressCallback | None, message: str, total: int, most: int | None = None
    ) -> None:
        super().__init__(callback, "files", total)
        self._message = message
        self._most = most
        self._done = 0

    def add(self, count: int) -> None:
        """Count copied bytes; more than `most` are an error."""
        self._done += count
        if self._most is not None and self._done > self._most:
            raise FileTransferError(f"the source has more than max_bytes={self._most} bytes")
        if self.due:
            self.tell()

    def tell(self) -> None:
        """Report the progress now."""
        self.report(self._message, self._done)


def temporary_name(name: str) -> str:
    """Return a hidden name that no other transfer uses."""
    short = os.fsdecode(os.fsencode(name)[:200])  # a name has at most 255 bytes
    return f".{short}.smolvm-{secrets.token_hex(4)}"


def opened(path: Path, flags: int) -> AbstractAsyncContextManager[int]:
    """Open a file of this host for the block, and yield its descriptor."""
    return acquired(in_background(os.open, path, flags | os.O_CLOEXEC, 0o600), os.close)


async def each(items: Iterable[T], work: Callable[[T], Coroutine[Any, Any, None]]) -> None:
    """Call `work` with each item, several at a time; the first failure cancels all other calls."""
    pending = iter(items)
    failures: list[Exception] = []

    async def worker() -> None:
        for item in pending:
            try:
                await work(item)
            except Exception as error:
                failures.append(error)
                group.cancel_scope.cancel()
                return

    async with anyio.create_task_group() as group:
        for _ in range(AT_A_TIME):
            group.start_soon(worker)
    if failures:
        raise failures[0]


async def copy_blocks(
    size: int, block: int, copy: Callable[[int, int], Coroutine[Any, Any, int]]
) -> None:
    """Copy a file of `size` bytes in blocks.

    `copy` gets an offset and a number of bytes, and returns the number of bytes that it copied.
    """

    async def whole(offset: int) -> None:
        end = min(offset + block, size)
        while offset < end:
            count = await copy(offset, end - offset)
            if not count:
                raise FileTransferError("the file became shorter while it was copied")
            offset += count

    if size > block:
        await each(range(0, size, block), whole)
    elif size:
        await whole(0)
    else:  # an empty file, or a file in /proc, whose size is always 0
        while count := await copy(size, block):
            size += count


class Reader(Protocol):
    """An open file of the guest."""

    async def read(self, size: int, offset: int) -> bytes:
        """Return at most `size` bytes; none at the end of the file."""


class Readable(Protocol):
    """A guest whose files can be read."""

    def block(self, size: int) -> int:
        """Return the bytes of a block of a file. Several blocks may be read at a time."""

    def open(self, path: str) -> AbstractAsyncContextManager[Reader]:
        """Open a file of the guest for the block."""

    async def readlink(self, path: str) -> str:
        """Return the target of a link."""


class Download:
    """A transfer out of the guest."""

    def __init__(self, guest: Readable, source: str, target: Path) -> None:
        self._guest, self._source, self._target = guest, source, target
        self.temporary = target.with_name(temporary_name(target.name))

    async def copy(self, tree: Sequence[Entry], meter: TransferMeter) -> None:
        """Copy everything under the temporary name."""
        directories = [entry for entry in tree if entry.kind == S_IFDIR]
        for entry in directories:
            await in_background(self._at(entry).mkdir, 0o700)
        files = [entry for entry in tree if entry.kind == S_IFREG]
        await each(files, partial(self._file, meter))
        for entry in tree:
            if entry.kind == S_IFLNK:
                link = await self._guest.readlink(f"{self._source}/{entry.path}")
                await in_background(os.symlink, link, self._at(entry))
        for entry in reversed(directories):
            await in_background(_set_attributes, self._at(entry), entry)

    def _at(self, entry: Entry) -> Path:
        return self.temporary / entry.path if entry.path else self.temporary

    async def _file(self, meter: TransferMeter, entry: Entry) -> None:
        source = f"{self._source}/{entry.path}" if entry.path else self._source
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

        async def copy(offset: int, size: int) -> int:
            content = await file.read(size, offset)
            if content:
                meter.add(len(content))
                await in_background(_write_all, fd, content, offset)
            return len(content)

        async with opened(self._at(entry), flags) as fd:
            async with self._guest.open(source) as file:
                await copy_blocks(entry.size, self._guest.block(entry.size), copy)
            await in_background(_set_attributes, fd, entry)

    async def publish(self) -> None:
        """Rename to the final name; merge into a directory that exists already."""
        await in_background(_publish, self.temporary, self._target)

    async def discard(self) -> None:
        """Remove the temporary file or directory."""
        await in_background(_remove, self.temporary)


def _set_attributes(where: Path | int, entry: Entry) -> None:
    os.utime(where, (entry.mtime, entry.mtime))
    os.chmod(where, stat.S_IMODE(entry.mode) & 0o777)  # without the set-user-id bit


def _write_all(fd: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _publish(temporary: Path, target: Path) -> None:
    try:
        there: int | None = target.lstat().st_mode
    except FileNotFoundError:
        there = None
    arrived = stat.S_ISDIR(temporary.lstat().st_mode)
    if there is not None and arrived != stat.S_ISDIR(there):
        raise unlike(str(target))
    if there is None or not arrived:
        os.replace(temporary, target)
        return
    for path in list(temporary.iterdir()):
        _publish(path, target / path.name)
    temporary.rmdir()


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def unlike(target: str) -> FileTransferError:
    """Return the error for a file that would replace a directory, or a directory a file."""
    return FileTransferError(
        f"{target!r} exists, but the source and the target are not both files or both directories: "
        "remove the target, or choose another name"
    )
