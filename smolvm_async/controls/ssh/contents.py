"""The guest's files as bytes, over SFTP: a `FileAccess`."""

from __future__ import annotations

import asyncio
import shlex
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from smolvm_async.controls.commands.transport import Command
from smolvm_async.controls.contents import MOST, check_length
from smolvm_async.controls.file_info import FileInfo, kind_of
from smolvm_async.controls.files.copying import TransferMeter, copy_blocks
from smolvm_async.controls.files.files import carry_out, explained
from smolvm_async.controls.files.tree import Entry
from smolvm_async.controls.ssh.execution import SSHTransport
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.transfer import (
    ONE_BY_ONE,
    IntoGuest,
    SFTPFiles,
    block_size,
    remove_tree,
)
from smolvm_async.errors import FileTransferError

if TYPE_CHECKING:
    from asyncssh import SFTPAttrs, SFTPClient

MOST_FILES = 100_000  # of a directory, which a hostile guest may list without an end
QUOTED = 300  # characters of the guest's answer in a message


class SFTPAccess:
    """The files of a guest that has an SSH server."""

    def __init__(self, link: Link, *, windows: bool = False) -> None:
        self._link = link
        self._windows = windows

    @asynccontextmanager
    async def _session(self, path: str) -> AsyncIterator[SFTPClient]:
        async with self._link.sftp() as sftp:
            with explained(SFTPFiles(self._link, sftp).explanation, repr(path)):
                yield sftp

    async def read(self, path: str, offset: int, length: int | None) -> bytes:
        """Read a file; without a length, refuse a file of more than `MOST` bytes."""
        async with self._session(path) as sftp:
            attrs = await sftp.stat(path)
            if kind_of(attrs.permissions or 0) != "file":  # to open a FIFO would wait for a writer
                raise FileTransferError("it is not a file")
            size, most = max(0, (attrs.size or 0) - offset), length
            if most is None:
                check_length(size)
                most = MOST + 1
            blocks: dict[int, bytes] = {}
            async with sftp.open(path, "rb", **ONE_BY_ONE) as file:

                async def read(start: int, count: int) -> int:
                    data = await file.read(min(count, most - start), offset + start)
                    assert isinstance(data, bytes)
                    blocks[start] = data
                    return len(data)

                # A file of /proc has no size: read until its end.
                whole = min(size, most) if attrs.size else 0
                await copy_blocks(whole, block_size(sftp.limits.max_read_len), read)
        content = b"".join(blocks[start] for start in sorted(blocks))
        if length is None:
            check_length(len(content))
        return content

    async def write(self, path: str, content: bytes, mode: int | None, make_dirs: bool) -> None:
        """Replace a file as a whole, or not at all."""
        async with self._session(path) as sftp:
            if await sftp.islink(path):
                path = str(await sftp.realpath(path))
            has_old = not self._windows and await sftp.exists(path)
            old = await sftp.stat(path) if has_old else None
            mode = None if self._windows else mode
            upload = _Content(self._link, sftp, path, content, mode, old)
            await carry_out(upload, [], TransferMeter(None, "", 0), make_dirs=make_dirs)

    async def entries(self, path: str) -> list[FileInfo]:
        """Return the files in a directory, sorted by name."""
        infos: list[FileInfo] = []
        async with self._session(path) as sftp:
            if kind_of((await sftp.stat(path)).permissions or 0) != "directory":
                raise FileTransferError("it is not a directory")
            async for found in sftp.scandir(path):
                name = str(found.filename)
                if name in (".", ".."):
                    continue
                if len(infos) == MOST_FILES:
                    raise FileTransferError(f"it has more than {MOST_FILES} files")
                infos.append(_info(path, name, found.attrs))
        return sorted(infos)

    async def remove(self, path: str, recursive: bool) -> None:
        """Remove a file, or a directory."""
        import asyncssh

        async with self._session(path) as sftp:
            directory = stat.S_ISDIR((await sftp.lstat(path)).permissions or 0)
            if not directory:
                await sftp.remove(path)
            elif recursive and self._windows:
                await remove_tree(sftp, path)
            elif not recursive:
                try:
                    await sftp.rmdir(path)
                except asyncssh.SFTPFailure as error:
                    raise FileTransferError(
                        "the directory is not empty.", hint="Pass recursive=True."
                    ) from error
        if directory and recursive and not self._windows:
            await self._remove_tree(path)

    async def _remove_tree(self, path: str) -> None:
        """Remove a directory with its contents. SFTP would need a request for each file."""
        said = bytearray()
        command = Command(f"exec rm -rf -- {shlex.quote(path)}", "raw", {}, b"")
        running = SSHTransport(self._link).executing(
            command, lambda _, data: said.extend(data), lambda _: None
        )
        async with running as removal:
            await asyncio.wait([removal.ended])
        if removal.exit_code is None:
            raise self._link.lost()
        if removal.exit_code:
            raise FileTransferError(said.decode(errors="replace")[:QUOTED].strip())

    async def make_directory(self, path: str, parents: bool) -> None:
        """Make a directory."""
        import asyncssh

        async with self._session(path) as sftp:
            if parents:
                await sftp.makedirs(path, exist_ok=True)
                return
            try:
                await sftp.mkdir(path)
            except asyncssh.SFTPFailure as error:
                if await sftp.lexists(path):
                    raise FileTransferError("it exists already") from error
                raise

    async def exists(self, path: str) -> bool:
        """Return whether a path leads to a file or a directory."""
        async with self._session(path) as sftp:
            return await sftp.exists(path)


class _Content(IntoGuest):
    """A transfer of bytes into a file. `old` has the attributes of the file that they replace."""

    def __init__(
        self,
        link: Link,
        sftp: SFTPClient,
        target: str,
        content: bytes,
        mode: int | None,
        old: SFTPAttrs | None,
    ) -> None:
        super().__init__(link, sftp, target)
        self._content, self._mode, self._old = content, mode, old

    async def copy(self, tree: Sequence[Entry], meter: TransferMeter) -> None:
        """Write everything under the temporary name."""
        from asyncssh import SFTPAttrs, SFTPPermissionDenied

        assert self.temporary is not None
        old, mode = self._old, self._mode
        if mode is None and old is not None:
            mode = stat.S_IMODE(old.permissions or 0)
        secret = SFTPAttrs() if mode is None else SFTPAttrs(permissions=0o600)
        async with self._sftp.open(self.temporary, "xb", secret, **ONE_BY_ONE) as file:

            async def write(offset: int, size: int) -> int:
                block = self._content[offset : offset + size]
                await file.write(block, offset)
                return len(block)

            size = block_size(self._sftp.limits.max_write_len)
            await copy_blocks(len(self._content), size, write)
            if old is not None:
                with suppress(SFTPPermissionDenied):  # only root may give files away
                    await file.setstat(SFTPAttrs(uid=old.uid, gid=old.gid))
            if mode is not None:  # after the owner, whose change removes the set-user-id bit
                await file.setstat(SFTPAttrs(permissions=mode))


def _info(directory: str, name: str, attrs: SFTPAttrs) -> FileInfo:
    mode = attrs.permissions or 0
    path = str(PurePosixPath(directory) / name)
    kind, modified = kind_of(mode), float(attrs.mtime or 0)
    return FileInfo(name, path, kind, attrs.size or 0, stat.S_IMODE(mode), modified)
