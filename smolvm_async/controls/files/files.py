"""Uploads into a guest and downloads from it: check arguments, clean up, and explain errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smolvm_async.config.checks import check_integer, check_path
from smolvm_async.config.options import check_progress
from smolvm_async.controls.files.copying import Download, TransferMeter
from smolvm_async.controls.files.paths import (
    check_guest_path,
    check_windows_tree,
    name_of,
    without_slash,
)
from smolvm_async.controls.files.transport import GuestFiles, OverFiles, Upload
from smolvm_async.controls.files.tree import Entry, local_tree, size_of
from smolvm_async.errors import ConfigError, FileTransferError
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.foundation.tail import printable
from smolvm_async.foundation.tasks import in_background, settle


class Files(OverFiles):
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
        merged into an existing directory. Modes and times are kept; links stay links. Through the
        guest agent, the temporary copy is in a directory of its own; a guest needs room for 16 MiB
        or the biggest file more; names that are not UTF-8 can only be uploaded, and only inside of
        a directory. In a Windows guest, there are no modes, and links are refused.

        Args:
            local_path: The file or directory to copy; `~` is expanded.
            guest_path: The absolute path to copy to, such as `/root/x` or `C:/x`. If the path is a
                directory or ends with a slash, the copy goes into that directory under the source's
                name.
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
        windows = self._has_windows_paths()
        target = check_guest_path(guest_path, windows=windows)
        tree = await in_background(_local_source, source)
        if windows:
            check_windows_tree(tree, target)
        async with await self._files("upload_file") as guest:
            upload = guest.upload(source, target)
            with explained(guest.explanation, f"{str(source)!r} to {target!r}"):
                meter = TransferMeter(
                    on_progress, f"uploading {printable(source.name)}", size_of(tree)
                )
                await carry_out(upload, tree, meter, make_dirs=make_dirs)
            return upload.target

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
        source = without_slash(check_guest_path(guest_path, windows=self._has_windows_paths()))
        target = check_path(local_path, "local_path", "a file or directory")
        if max_bytes is not None:
            check_integer("max_bytes", max_bytes, 0, None, "bytes, 0 or more")
        name = name_of(source)
        if await in_background(os.path.isdir, target) or str(local_path).endswith("/"):
            if not name:
                raise ConfigError(
                    f"guest_path={source!r} has no file name: pass a local_path= that does not "
                    "exist yet."
                )
            target /= name
        async with await self._files("download_file") as guest:
            with explained(guest.explanation, f"{source!r} to {str(target)!r}"):
                await _receive(guest, source, target, make_dirs, max_bytes, on_progress)
        return target


async def carry_out(
    upload: Upload, tree: list[Entry], meter: TransferMeter, *, make_dirs: bool
) -> None:
    """Copy and publish; after a failure or a cancellation, remove the temporary copy."""
    full = False
    try:
        await upload.place(make_dirs=make_dirs)
        await upload.copy(tree, meter)
        await upload.publish()
        meter.tell()
    except BaseException as error:
        try:
            full = await upload.met_full_disk(error)
        finally:
            await settle(upload.discard())
        if full:
            raise _full("the guest's", upload.target) from error
        raise


async def _receive(
    guest: GuestFiles,
    source: str,
    target: Path,
    make_dirs: bool,
    max_bytes: int | None,
    on_progress: ProgressCallback | None,
) -> None:
    """Copy to this host; after a failure or a cancellation, remove the temporary copy."""
    tree = await guest.tree(source)
    size = size_of(tree)
    if max_bytes is not None and size > max_bytes:
        raise FileTransferError(f"the source has {size} bytes, more than max_bytes={max_bytes}")
    if make_dirs:
        await in_background(os.makedirs, target.parent, 0o777, True)
    meter = TransferMeter(on_progress, f"downloading {printable(target.name)}", size, max_bytes)
    download = Download(guest, source, target)
    try:
        await download.copy(tree, meter)
        await download.publish()
    except BaseException:
        await settle(download.discard())
        raise
    meter.tell()


@contextmanager
def explained(
    explanation: Callable[[Exception, str], Exception | None], subject: str
) -> Iterator[None]:
    """Turn the errors of the way to the guest, and of this host, into the library's own."""
    try:
        yield
    except Exception as error:
        told = explanation(error, subject) or _explanation(error, subject)
        if told is None:
            raise
        raise told from error


def _explanation(error: Exception, subject: str) -> Exception | None:
    """Return the error to raise instead; `None` to raise `error` itself."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _full("this host's", subject)
    if isinstance(error, FileTransferError):
        return FileTransferError(f"{subject}: {error.message}", hint=error.hint)
    if isinstance(error, OSError | UnicodeError):  # this host's locale may lack a character
        return FileTransferError(f"{subject}: {error}")
    return None


def _full(whose: str, where: str) -> FileTransferError:
    return FileTransferError(
        f"no space left on {whose} disk ({where}).", hint="Free some space, and try again."
    )


def _local_source(source: Path) -> list[Entry]:
    try:
        return local_tree(source)
    except FileNotFoundError as error:
        raise ConfigError(
            f"local_path={str(source)!r}: {error.filename!r} does not exist."
        ) from None
    except OSError as error:
        raise ConfigError(f"local_path={str(source)!r} cannot be read: {error}.") from error
