"""A guest's files over SFTP: one way of uploads and downloads; see `files/copying.py`.

A Windows guest has neither owners nor modes here; see `ssh/windows.py` for its paths.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from stat import S_IFDIR, S_IFLNK, S_IFREG
from typing import TYPE_CHECKING

from smolvm_async.controls.files.copying import (
    TransferMeter,
    copy_blocks,
    each,
    opened,
    temporary_name,
    unlike,
)
from smolvm_async.controls.files.paths import name_problem
from smolvm_async.controls.files.tree import Entry, checked
from smolvm_async.controls.ssh.link import Link
from smolvm_async.errors import ConnectionLostError, FileTransferError
from smolvm_async.foundation.tasks import in_background

if TYPE_CHECKING:
    from asyncssh import SFTPAttrs, SFTPClient, SFTPClientFile

CLEANING = 10.0  # seconds to remove the rest of a failed transfer
LEAST_BLOCK, MOST_BLOCK = 16 << 10, 256 << 10  # bytes; the server reports its own limit
ONE_BY_ONE = {"block_size": 0}  # asyncssh's own blocks would continue after a cancellation


class SFTPFiles:
    """The files of a guest in one SFTP session: a `GuestFiles`."""

    def __init__(self, link: Link, sftp: SFTPClient, *, windows: bool = False) -> None:
        self.turn = link.env_turn
        self.windows = windows
        self._link = link
        self._sftp = sftp

    @classmethod
    @asynccontextmanager
    async def opened(cls, link: Link, *, windows: bool = False) -> AsyncIterator[SFTPFiles]:
        """Open a session for the block."""
        async with link.sftp() as sftp:
            yield cls(link, sftp, windows=windows)

    async def tree(self, source: str) -> list[Entry]:
        """See `GuestFiles.tree()`."""
        return await guest_tree(self._sftp, source)

    def upload(self, source: Path, target: str) -> SFTPUpload:
        """See `GuestFiles.upload()`."""
        return SFTPUpload(self._link, self._sftp, source, target, windows=self.windows)

    async def read_own(self, name: str) -> bytes:
        """See `GuestFiles.read_own()`."""
        from asyncssh import SFTPNoSuchFile

        try:
            async with self._sftp.open(name, "rb") as file:
                content = await file.read()
        except SFTPNoSuchFile:
            return b""
        assert isinstance(content, bytes)
        return content

    async def write_own(self, name: str, content: bytes) -> None:
        """See `GuestFiles.write_own()`."""
        from asyncssh import SFTPAttrs

        new = f"{name}.{secrets.token_hex(4)}"
        async with self._sftp.open(new, "xb", attrs=SFTPAttrs(permissions=0o600)) as file:
            await file.write(content)
        await self._sftp.posix_rename(new, name)

    def explanation(self, error: Exception, subject: str) -> Exception | None:
        """See `GuestFiles.explanation()`."""
        return explanation(error, self._link, subject)

    def block(self, size: int) -> int:
        """See `Readable.block()`."""
        return block_size(self._sftp.limits.max_read_len)

    @asynccontextmanager
    async def open(self, path: str) -> AsyncIterator[SFTPReader]:
        """See `Readable.open()`."""
        async with self._sftp.open(path, "rb", **ONE_BY_ONE) as file:
            yield SFTPReader(file)

    async def readlink(self, path: str) -> str:
        """See `Readable.readlink()`."""
        return str(await self._sftp.readlink(path))


class SFTPReader:
    """An open file of the guest."""

    def __init__(self, file: SFTPClientFile) -> None:
        self._file = file

    async def read(self, size: int, offset: int) -> bytes:
        """See `Reader.read()`."""
        content = await self._file.read(size, offset)
        assert isinstance(content, bytes)
        return content


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
    return checked(Entry(path, attrs.permissions or 0, attrs.size or 0, attrs.mtime or 0), shown)


async def remove_tree(sftp: SFTPClient, root: str) -> None:
    """Remove a directory with its contents. asyncssh's `rmtree()` refuses backslashes in names."""
    tree = await guest_tree(sftp, root)
    directories = [entry for entry in tree if entry.kind == S_IFDIR]
    others = [entry for entry in tree if entry.kind != S_IFDIR]
    await each(others, lambda entry: sftp.remove(f"{root}/{entry.path}"))
    for entry in reversed(directories):
        await sftp.rmdir(f"{root}/{entry.path}".rstrip("/"))


async def _remove(sftp: SFTPClient, path: str) -> None:
    if not await sftp.lexists(path):
        return
    if await sftp.isdir(path):
        await remove_tree(sftp, path)
    else:
        await sftp.remove(path)


class IntoGuest:
    """A transfer into the guest: an `Upload`."""

    def __init__(self, link: Link, sftp: SFTPClient, target: str) -> None:
        self.target = target
        self.temporary: str | None = None
        self._link = link
        self._sftp = sftp

    async def place(self, *, make_dirs: bool) -> None:
        """See `Upload.place()`."""
        path = PurePosixPath(self.target)
        if make_dirs:
            await self._sftp.makedirs(str(path.parent), exist_ok=True)
        self.temporary = str(path.with_name(temporary_name(path.name)))

    async def copy(self, tree: Sequence[Entry], meter: TransferMeter) -> None:
        """See `Upload.copy()`."""
        raise NotImplementedError

    async def publish(self) -> None:
        """See `Upload.publish()`."""
        assert self.temporary is not None
        await self._publish(self.temporary, self.target)

    async def _publish(self, temporary: str, target: str) -> None:
        arrived = await self._sftp.lstat(temporary)
        there = None
        if await self._sftp.lexists(target):
            there = await self._sftp.lstat(target)
        both = [stat.S_ISDIR(attrs.permissions or 0) for attrs in (arrived, there) if attrs]
        if len(both) == 2 and both[0] != both[1]:
            raise unlike(target)
        if both != [True, True]:
            await self._sftp.posix_rename(temporary, target)
            return
        for name in await self._sftp.listdir(temporary):
            if name not in (".", ".."):
                await self._publish(f"{temporary}/{name}", f"{target}/{name}")
        await self._sftp.rmdir(temporary)

    async def discard(self) -> None:
        """See `Upload.discard()`."""
        import asyncssh

        if self.temporary is None:
            return
        with contextlib.suppress(asyncssh.Error, OSError, TimeoutError):
            async with asyncio.timeout(CLEANING):
                try:
                    await _remove(self._sftp, self.temporary)
                except (asyncssh.SFTPNoConnection, asyncssh.SFTPConnectionLost):
                    self._link.go_on(self._discard_lost(self.temporary))

    async def _discard_lost(self, temporary: str) -> None:
        """Remove the temporary copy after the loss of the connection, if the guest answers."""
        import asyncssh

        with contextlib.suppress(asyncssh.Error, OSError, ConnectionLostError):
            async with self._link.sftp() as sftp:
                await _remove(sftp, temporary)

    async def met_full_disk(self, error: BaseException) -> bool:
        """See `Upload.met_full_disk()`: SFTP only reports "Failure"."""
        import asyncssh

        if not isinstance(error, asyncssh.SFTPError):
            return False
        with contextlib.suppress(asyncssh.Error, OSError):
            status = await self._sftp.statvfs(str(PurePosixPath(self.target).parent))
            return status.bavail == 0 or status.favail == 0 < status.files
        return False


class SFTPUpload(IntoGuest):
    """A transfer of a file or a directory of this host into the guest."""

    def __init__(
        self,
        link: Link,
        sftp: SFTPClient,
        source: Path,
        target: str,
        *,
        windows: bool = False,
    ) -> None:
        super().__init__(link, sftp, target)
        self._source = source
        self._windows = windows

    async def place(self, *, make_dirs: bool) -> None:
        """See `Upload.place()`."""
        if self.target.endswith("/") or await self._sftp.isdir(self.target):
            if self._windows and (problem := name_problem(self._source.name)):
                raise FileTransferError(problem)
            self.target = f"{self.target.rstrip('/')}/{self._source.name}"
        await super().place(make_dirs=make_dirs)

    async def copy(self, tree: Sequence[Entry], meter: TransferMeter) -> None:
        """See `Upload.copy()`."""
        from asyncssh import SFTPAttrs

        directories = [entry for entry in tree if entry.kind == S_IFDIR]
        for entry in directories:
            await self._sftp.mkdir(self._at(entry), SFTPAttrs(permissions=0o700))
        files = [entry for entry in tree if entry.kind == S_IFREG]
        await each(files, partial(self._file, meter))
        for entry in tree:
            if entry.kind == S_IFLNK:
                link = await in_background(os.readlink, self._source / entry.path)
                await self._sftp.symlink(link, self._at(entry))
        for entry in reversed(directories):
            await self._sftp.setstat(self._at(entry), self._attributes(entry))

    def _at(self, entry: Entry) -> str:
        assert self.temporary is not None
        return f"{self.temporary}/{entry.path}" if entry.path else self.temporary

    async def _file(self, meter: TransferMeter, entry: Entry) -> None:
        source = self._source / entry.path if entry.path else self._source

        async def copy(offset: int, size: int) -> int:
            content = await in_background(os.pread, fd, size, offset)
            if content:
                await target.write(content, offset)
                meter.add(len(content))
            return len(content)

        async with (
            opened(source, os.O_RDONLY) as fd,
            self._sftp.open(self._at(entry), "xb", **ONE_BY_ONE) as target,
        ):
            await copy_blocks(entry.size, block_size(self._sftp.limits.max_write_len), copy)
            await target.setstat(self._attributes(entry))

    def _attributes(self, entry: Entry) -> SFTPAttrs:
        from asyncssh import SFTPAttrs

        mode = None if self._windows else stat.S_IMODE(entry.mode)
        mtime = int(entry.mtime)
        return SFTPAttrs(permissions=mode, atime=mtime, mtime=mtime)


def explanation(error: Exception, link: Link, subject: str) -> Exception | None:
    """Return the error to raise instead of an error of SSH; `None` for other errors."""
    import asyncssh  # takes no time: the connection has imported it

    lost = (asyncssh.SFTPNoConnection, asyncssh.SFTPConnectionLost, asyncssh.DisconnectError)
    if isinstance(error, (*lost, asyncssh.ChannelOpenError, ConnectionError)):
        return link.lost()
    if isinstance(error, asyncssh.Error):
        return FileTransferError(f"{subject}: the guest's SFTP server reports: {error}")
    return None


def block_size(most: int) -> int:
    """Return the bytes of a block, for a server that allows `most`."""
    return max(LEAST_BLOCK, min(most, MOST_BLOCK))
