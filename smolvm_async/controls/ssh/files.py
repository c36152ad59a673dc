"""Uploads into a guest and downloads from it: check arguments, clean up, and explain errors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from stat import S_IFREG
from typing import TYPE_CHECKING

from smolvm_async.config.checks import check_integer, check_path, encoded, shown
from smolvm_async.config.options import check_progress
from smolvm_async.controls.ssh.link import Link, OverSSH
from smolvm_async.controls.ssh.transfer import (
    Entry,
    FromGuest,
    IntoGuest,
    ToGuest,
    TransferMeter,
    guest_tree,
    local_tree,
)
from smolvm_async.errors import ConfigError, FileTransferError
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.foundation.tail import printable
from smolvm_async.foundation.tasks import in_background, settle

if TYPE_CHECKING:
    from asyncssh import SFTPClient

CLEANING = 10.0  # seconds to remove the rest of a failed transfer


class Files(OverSSH):
    """`AsyncSmolVM`'s uploads and downloads."""

    async def upload_file(
        self,
        local_path: str | os.PathLike[str],
        guest_path: str,
        *,
        make_dirs: bool = True,
        on_progress: ProgressCallback | None = None,
    ) -> str:
        """Copy a file, or a directory with its contents, into the guest.

        Until the copy is complete, it has a temporary name in the same directory. A directory is
        merged into an existing directory. Modes and times are kept; links stay links.

        Args:
            local_path: The file or directory to copy; `~` is expanded.
            guest_path: The absolute path to copy to. If the path is a directory or ends with a
                slash, the copy goes into that directory under the source's name.
            make_dirs: Whether to make missing directories above `guest_path`.
            on_progress: Called with a `Progress` in bytes, about ten times a second.

        Returns:
            The path in the guest.

        Raises:
            FileTransferError: The copy failed: a disk is full, a permission is missing, ...
            ConnectionLostError, VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("upload_file")
        check_progress(on_progress)
        source = check_path(local_path, "local_path", "a file or directory")
        target = check_guest_path(guest_path)
        tree = await in_background(_local_source, source)
        link = await self._reach()
        async with explained(link, f"{str(source)!r} to {target!r}"), link.sftp() as sftp:
            if target.endswith("/") or await sftp.isdir(target):
                target = f"{target.rstrip('/')}/{source.name}"
            parent = str(PurePosixPath(target).parent)
            if make_dirs:
                await sftp.makedirs(parent, exist_ok=True)
            meter = TransferMeter(on_progress, f"uploading {printable(source.name)}", _size(tree))
            await carry_out(ToGuest(sftp, source, target, meter), tree, sftp, parent)
            meter.tell()
        return target

    async def download_file(
        self,
        guest_path: str,
        local_path: str | os.PathLike[str],
        *,
        make_dirs: bool = True,
        max_bytes: int | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> Path:
        """Copy a file or a directory out of the guest. See `upload_file()`.

        No name or link from the guest can lead out of `local_path`; set-user-id bits are removed.

        Args:
            guest_path: The absolute path of the file or directory to copy.
            local_path: The path to copy to; see `guest_path` of `upload_file()`.
            make_dirs: Whether to make missing directories above `local_path`.
            max_bytes: The maximum number of bytes; more is an error. By default no limit.
            on_progress: See `upload_file()`.

        Returns:
            The path on the host.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("download_file")
        check_progress(on_progress)
        source = check_guest_path(guest_path).rstrip("/") or "/"
        target = check_path(local_path, "local_path", "a file or directory")
        if max_bytes is not None:
            check_integer("max_bytes", max_bytes, 0, None, "bytes, 0 or more")
        name = PurePosixPath(source).name
        if await in_background(os.path.isdir, target) or str(local_path).endswith("/"):
            if not name:
                raise ConfigError(
                    "guest_path='/' has no file name: pass a local_path= that does not exist yet."
                )
            target /= name
        link = await self._reach()
        async with explained(link, f"{source!r} to {str(target)!r}"), link.sftp() as sftp:
            tree = await guest_tree(sftp, source)
            size = _size(tree)
            if max_bytes is not None and size > max_bytes:
                raise FileTransferError(
                    f"the source has {size} bytes, more than max_bytes={max_bytes}"
                )
            if make_dirs:
                await in_background(os.makedirs, target.parent, 0o777, True)
            meter = TransferMeter(on_progress, f"downloading {printable(name)}", size)
            await carry_out(FromGuest(sftp, source, target, meter), tree)
            meter.tell()
        return target


async def carry_out(
    transfer: IntoGuest | FromGuest,
    tree: list[Entry],
    sftp: SFTPClient | None = None,
    directory: str = "",
) -> None:
    """Copy and publish; after a failure or a cancellation, remove the temporary copy.

    For an upload, pass `sftp` and the guest's `directory`, to report a full disk as the reason.
    """
    full = False
    try:
        await transfer.copy(tree)
        await transfer.publish()
    except BaseException as error:
        try:
            full = sftp is not None and await _is_full(sftp, directory, error)
        finally:
            await settle(_clean(transfer))
        if full:
            raise _full("the guest's", directory) from error
        raise


async def _clean(transfer: IntoGuest | FromGuest) -> None:
    """Remove the temporary copy of a failed transfer, if the guest still answers."""
    import asyncssh

    with contextlib.suppress(asyncssh.Error, OSError, TimeoutError):
        async with asyncio.timeout(CLEANING):
            await transfer.discard()


@asynccontextmanager
async def explained(link: Link, subject: str) -> AsyncIterator[None]:
    """Turn the errors of SSH and of this host into `FileTransferError` or `ConnectionLostError`."""
    try:
        yield
    except Exception as error:
        explanation = _explanation(error, link, subject)
        if explanation is None:
            raise
        raise explanation from error


def _explanation(error: Exception, link: Link, subject: str) -> Exception | None:
    """Return the error to raise instead; `None` to raise `error` itself."""
    import asyncssh  # takes no time: the connection has imported it

    lost = (asyncssh.SFTPNoConnection, asyncssh.SFTPConnectionLost, asyncssh.DisconnectError)
    if isinstance(error, (*lost, asyncssh.ChannelOpenError, ConnectionError)):
        return link.lost()
    if isinstance(error, asyncssh.Error):
        return FileTransferError(f"{subject}: the guest's SFTP server reports: {error}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _full("this host's", subject)
    if isinstance(error, FileTransferError):
        return FileTransferError(f"{subject}: {error.message}", hint=error.hint)
    if isinstance(error, OSError | UnicodeError):  # this host's locale may lack a character
        return FileTransferError(f"{subject}: {error}")
    return None


async def _is_full(sftp: SFTPClient, directory: str, error: BaseException) -> bool:
    """Return whether a full disk in the guest is the reason: SFTP only reports "Failure"."""
    import asyncssh

    if not isinstance(error, asyncssh.SFTPError):
        return False
    with contextlib.suppress(asyncssh.Error, OSError):
        status = await sftp.statvfs(directory)
        return status.bavail == 0 or status.favail == 0 < status.files
    return False


def _full(whose: str, where: str) -> FileTransferError:
    return FileTransferError(
        f"no space left on {whose} disk ({where}).", hint="Free some space, and try again."
    )


def check_guest_path(path: object, name: str = "guest_path") -> str:
    """Check a path in the guest; `name` is the argument's."""
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if (
        not isinstance(path, str)
        or not path.startswith("/")
        or "\0" in path
        or encoded(path) is None
    ):
        raise ConfigError(
            f"{name}={shown(path)} is wrong: pass an absolute path in the guest, such as "
            "'/root/data.csv'; os.fsdecode() makes a path from bytes."
        )
    return path


def _local_source(source: Path) -> list[Entry]:
    try:
        return local_tree(source)
    except FileNotFoundError as error:
        raise ConfigError(
            f"local_path={str(source)!r}: {error.filename!r} does not exist."
        ) from None
    except OSError as error:
        raise ConfigError(f"local_path={str(source)!r} cannot be read: {error}.") from error


def _size(tree: list[Entry]) -> int:
    return sum(entry.size for entry in tree if entry.kind == S_IFREG)
