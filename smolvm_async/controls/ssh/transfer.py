"""The transfer of a file or a directory over SFTP, into the guest or out of it.

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
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path, PurePosixPath
from stat import S_IFDIR, S_IFLNK, S_IFREG
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import anyio

from smolvm_async.errors import FileTransferError
from smolvm_async.foundation.progress import Meter, ProgressCallback
from smolvm_async.foundation.tasks import acquired, in_background

if TYPE_CHECKING:
    from asyncssh import SFTPAttrs, SFTPClient, SFTPClientFile


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
    """List a file or a directory of the guest; refuse names that could lead out of the tree."""
    tree = [_guest_entry("", await sftp.stat(root), root)]
    pending = [""] if tree[0].kind == S_IFDIR else []
    seen = {""}
    while pending:
        directory = pending.pop()
        async for found in sftp.scandir(f"{root}/{directory}"):
            name = str(found.filename)
            if name in (".", ".."):
                continue
            path = f"{directory}/{name}".lstrip("/")
            if not name or "/" in name or "\0" in name or path in seen:
                raise FileTransferError(f"the guest reports an unsafe file name: {name!r}")
            seen.add(path)
            entry = _guest_entry(path, found.attrs, f"{root}/{path}")
            tree.append(entry)
            if entry.kind == S_IFDIR:
                pending.append(path)
    return tree


def _guest_entry(path: str, attrs: SFTPAttrs, shown: str) -> Entry:
    return _checked(Entry(path, attrs.permissions or 0, attrs.size or 0, attrs.mtime or 0), shown)


def _checked(entry: Entry, shown: str) -> Entry:
    if entry.kind not in (S_IFDIR, S_IFREG, S_IFLNK):
        raise FileTransferError(
            f"{shown!r} cannot be copied: it is not a file, directory or link, but a socket, FIFO "
            "or device; remove it, or copy the other files one by one"
        )
    return entry


AT_A_TIME = 16  # files to copy at a time, and blocks of each file
LEAST_BLOCK, MOST_BLOCK = 16 << 10, 256 << 10  # bytes; the server reports its own limit
ONE_BY_ONE = {"block_size": 0}  # asyncssh's own blocks would continue after a cancellation

T = TypeVar("T")


class TransferMeter(Meter):
    """A meter that reports how many bytes of the files are copied."""

    def __init__(self, callback: ProgressCallback | None, message: str, total: int) -> None:
        super().__init__(callback, "files", total)
        self._message = message
        self._done = 0

    def add(self, count: int) -> None:
        """Count copied bytes."""
        self._done += count
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


class IntoGuest:
    """A transfer into the guest."""

    def __init__(self, sftp: SFTPClient, target: str) -> None:
        self._sftp, self._target = sftp, target
        path = PurePosixPath(target)
        self.temporary = str(path.with_name(temporary_name(path.name)))

    async def copy(self, tree: Sequence[Entry]) -> None:
        """Copy everything under the temporary name."""
        raise NotImplementedError

    async def publish(self, temporary: str | None = None, target: str | None = None) -> None:
        """Rename to the final name; merge into a directory that exists already."""
        temporary, target = temporary or self.temporary, target or self._target
        arrived = await self._sftp.lstat(temporary)
        there = None
        if await self._sftp.lexists(target):
            there = await self._sftp.lstat(target)
        both = [stat.S_ISDIR(attrs.permissions or 0) for attrs in (arrived, there) if attrs]
        if len(both) == 2 and both[0] != both[1]:
            raise _unlike(target)
        if both != [True, True]:
            await self._sftp.posix_rename(temporary, target)
            return
        for name in await self._sftp.listdir(temporary):
            if name not in (".", ".."):
                await self.publish(f"{temporary}/{name}", f"{target}/{name}")
        await self._sftp.rmdir(temporary)

    async def discard(self) -> None:
        """Remove the temporary file or directory."""
        if not await self._sftp.lexists(self.temporary):
            return
        if await self._sftp.isdir(self.temporary):
            await self._sftp.rmtree(self.temporary)
        else:
            await self._sftp.remove(self.temporary)


class ToGuest(IntoGuest):
    """A transfer of a file or a directory of this host into the guest."""

    def __init__(self, sftp: SFTPClient, source: Path, target: str, meter: TransferMeter) -> None:
        super().__init__(sftp, target)
        self._source, self._meter = source, meter

    async def copy(self, tree: Sequence[Entry]) -> None:
        """Copy everything under the temporary name."""
        from asyncssh import SFTPAttrs

        directories = [entry for entry in tree if entry.kind == S_IFDIR]
        for entry in directories:
            await self._sftp.mkdir(self._at(entry), SFTPAttrs(permissions=0o700))
        await each([entry for entry in tree if entry.kind == S_IFREG], self._file)
        for entry in tree:
            if entry.kind == S_IFLNK:
                link = await in_background(os.readlink, self._source / entry.path)
                await self._sftp.symlink(link, self._at(entry))
        for entry in reversed(directories):
            await self._sftp.setstat(self._at(entry), _attributes(entry))

    def _at(self, entry: Entry) -> str:
        return f"{self.temporary}/{entry.path}" if entry.path else self.temporary

    async def _file(self, entry: Entry) -> None:
        source = self._source / entry.path if entry.path else self._source
        async with (
            opened(source, os.O_RDONLY) as fd,
            self._sftp.open(self._at(entry), "xb", **ONE_BY_ONE) as target,
        ):
            block = block_size(self._sftp.limits.max_write_len)
            await copy_blocks(entry.size, block, partial(self._block, fd, target))
            await target.setstat(_attributes(entry))

    async def _block(self, fd: int, target: SFTPClientFile, offset: int, size: int) -> int:
        content = await in_background(os.pread, fd, size, offset)
        if content:
            await target.write(content, offset)
            self._meter.add(len(content))
        return len(content)


class FromGuest:
    """A transfer out of the guest."""

    def __init__(self, sftp: SFTPClient, source: str, target: Path, meter: TransferMeter) -> None:
        self._sftp, self._source, self._meter = sftp, source, meter
        self._target = target
        self.temporary = target.with_name(temporary_name(target.name))

    async def copy(self, tree: Sequence[Entry]) -> None:
        """Copy everything under the temporary name."""
        directories = [entry for entry in tree if entry.kind == S_IFDIR]
        for entry in directories:
            await in_background(self._at(entry).mkdir, 0o700)
        await each([entry for entry in tree if entry.kind == S_IFREG], self._file)
        for entry in tree:
            if entry.kind == S_IFLNK:
                link = await self._sftp.readlink(f"{self._source}/{entry.path}")
                await in_background(os.symlink, link, self._at(entry))
        for entry in reversed(directories):
            await in_background(_set_attributes, self._at(entry), entry)

    def _at(self, entry: Entry) -> Path:
        return self.temporary / entry.path if entry.path else self.temporary

    async def _file(self, entry: Entry) -> None:
        source = f"{self._source}/{entry.path}" if entry.path else self._source
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        async with opened(self._at(entry), flags) as fd:
            async with self._sftp.open(source, "rb", **ONE_BY_ONE) as file:
                block = block_size(self._sftp.limits.max_read_len)
                await copy_blocks(entry.size, block, partial(self._block, file, fd))
            await in_background(_set_attributes, fd, entry)

    async def _block(self, file: SFTPClientFile, fd: int, offset: int, size: int) -> int:
        content = await file.read(size, offset)
        assert isinstance(content, bytes)
        if content:
            await in_background(_write_all, fd, content, offset)
            self._meter.add(len(content))
        return len(content)

    async def publish(self) -> None:
        """Rename to the final name; merge into a directory that exists already."""
        await in_background(_publish, self.temporary, self._target)

    async def discard(self) -> None:
        """Remove the temporary file or directory."""
        await in_background(_remove, self.temporary)


def block_size(most: int) -> int:
    """Return the bytes of a block; `most` is the server's limit."""
    return max(LEAST_BLOCK, min(most, MOST_BLOCK))


def _attributes(entry: Entry) -> Any:
    from asyncssh import SFTPAttrs

    mtime = int(entry.mtime)
    return SFTPAttrs(permissions=stat.S_IMODE(entry.mode), atime=mtime, mtime=mtime)


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
        raise _unlike(str(target))
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


def _unlike(target: str) -> FileTransferError:
    return FileTransferError(
        f"{target!r} exists, but the source and the target are not both files or both directories: "
        "remove the target, or choose another name"
    )
