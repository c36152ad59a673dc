"""One transfer over SFTP: everything arrives beside its final name first, and is then published.

Writers differ by side and share the rest: directories are made first, files are copied several at
a time, links are made last, so that nothing is ever written through one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import anyio

from smolvm_async.errors import FileTransferError
from smolvm_async.progress import Progress, ProgressCallback, report
from smolvm_async.shielding import in_background
from smolvm_async.ssh.trees import Entry

if TYPE_CHECKING:
    from asyncssh import SFTPClient

AT_A_TIME = 16  # files
PIECE = 2 << 20  # bytes that are read and written at a time; SFTP splits them, in parallel
STEP = 0.1  # seconds between two reports


class Meter:
    """Tells how far a transfer is."""

    def __init__(self, callback: ProgressCallback | None, message: str, total: int) -> None:
        self._callback, self._message, self._total = callback, message, total
        self._started = self._told = time.monotonic()
        self._done = 0

    def add(self, count: int) -> None:
        """Some bytes more."""
        self._done += count
        if time.monotonic() - self._told > STEP:
            self.tell()

    def tell(self) -> None:
        """Report."""
        self._told = time.monotonic()
        elapsed = self._told - self._started
        report(self._callback, Progress("files", self._message, elapsed, self._done, self._total))


def temporary_name(name: str) -> str:
    """A hidden name that nobody else has."""
    return f".{name[:200]}.smolvm-{secrets.token_hex(4)}"


async def each(
    entries: Sequence[Entry], work: Callable[[Entry], Coroutine[Any, Any, None]]
) -> None:
    """Do something with each file, several at a time."""
    limiter = anyio.CapacityLimiter(AT_A_TIME)
    failures: list[Exception] = []

    async def one(entry: Entry) -> None:
        async with limiter:
            if failures:
                return
            try:
                await work(entry)
            except Exception as error:
                failures.append(error)
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for entry in entries:
            group.start_soon(one, entry)
    if failures:
        raise failures[0]


class ToGuest:
    """Writes into the guest."""

    def __init__(self, sftp: SFTPClient, source: Path, target: str, meter: Meter) -> None:
        self._sftp, self._source, self._meter = sftp, source, meter
        self._target = target
        path = PurePosixPath(target)
        self.temporary = str(path.with_name(temporary_name(path.name)))

    async def copy(self, tree: Sequence[Entry]) -> None:
        """Copy everything under the temporary name."""
        from asyncssh import SFTPAttrs

        directories = [entry for entry in tree if entry.is_directory]
        for entry in directories:
            await self._sftp.mkdir(self._at(entry), SFTPAttrs(permissions=0o700))
        await each([entry for entry in tree if entry.is_file], self._file)
        for entry in tree:
            if entry.is_link:
                link = await in_background(os.readlink, self._source / entry.path)
                await self._sftp.symlink(link, self._at(entry))
        for entry in reversed(directories):
            await self._sftp.setstat(self._at(entry), _attributes(entry))

    def _at(self, entry: Entry) -> str:
        return f"{self.temporary}/{entry.path}" if entry.path else self.temporary

    async def _file(self, entry: Entry) -> None:
        source = self._source / entry.path if entry.path else self._source
        file = await in_background(partial(source.open, "rb"))
        try:
            async with self._sftp.open(self._at(entry), "xb") as target:
                offset = 0
                while content := await in_background(file.read, PIECE):
                    await target.write(content, offset)  # in parallel blocks
                    offset += len(content)
                    self._meter.add(len(content))
                await target.setstat(_attributes(entry))
        finally:
            file.close()

    async def publish(self, temporary: str | None = None, target: str | None = None) -> None:
        """Give what has arrived its name; a directory that is there already gets the contents."""
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
        """Remove what has arrived."""
        if not await self._sftp.lexists(self.temporary):
            return
        if await self._sftp.isdir(self.temporary):
            await self._sftp.rmtree(self.temporary)
        else:
            await self._sftp.remove(self.temporary)


class FromGuest:
    """Writes here."""

    def __init__(self, sftp: SFTPClient, source: str, target: Path, meter: Meter) -> None:
        self._sftp, self._source, self._meter = sftp, source, meter
        self._target = target
        self.temporary = target.with_name(temporary_name(target.name))

    async def copy(self, tree: Sequence[Entry]) -> None:
        """Copy everything under the temporary name."""
        directories = [entry for entry in tree if entry.is_directory]
        for entry in directories:
            await in_background(self._at(entry).mkdir, 0o700)
        await each([entry for entry in tree if entry.is_file], self._file)
        for entry in tree:
            if entry.is_link:
                link = await self._sftp.readlink(f"{self._source}/{entry.path}")
                await in_background(os.symlink, link, self._at(entry))
        for entry in reversed(directories):
            await in_background(_set_attributes, self._at(entry), entry)

    def _at(self, entry: Entry) -> Path:
        return self.temporary / entry.path if entry.path else self.temporary

    async def _file(self, entry: Entry) -> None:
        source = f"{self._source}/{entry.path}" if entry.path else self._source
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = await in_background(os.open, self._at(entry), flags, 0o600)
        try:
            async with self._sftp.open(source, "rb") as file:
                offset = 0
                while content := await file.read(PIECE, offset):  # in parallel blocks
                    assert isinstance(content, bytes)
                    await in_background(_write_all, fd, content)
                    offset += len(content)
                    self._meter.add(len(content))
            await in_background(_set_attributes, fd, entry)
        finally:
            os.close(fd)

    async def publish(self) -> None:
        """Give what has arrived its name; a directory that is there already gets the contents."""
        await in_background(_publish, self.temporary, self._target)

    async def discard(self) -> None:
        """Remove what has arrived."""
        await in_background(_remove, self.temporary)


def _attributes(entry: Entry) -> Any:
    from asyncssh import SFTPAttrs

    mtime = int(entry.mtime)
    return SFTPAttrs(permissions=stat.S_IMODE(entry.mode), atime=mtime, mtime=mtime)


def _set_attributes(where: Path | int, entry: Entry) -> None:
    os.utime(where, (entry.mtime, entry.mtime))
    os.chmod(where, stat.S_IMODE(entry.mode) & 0o777)  # no set-user-id file comes out of a guest


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


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
        f"{target!r} is a directory on one side and none on the other: remove it, or choose "
        "another name"
    )
