"""The guest's files as bytes and text: no file of the host is involved.

`Contents` checks the arguments. A `FileAccess` does the work, over SSH (`ssh/contents.py`) or
through the guest's agent (`agent/contents.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, overload

from smolvm_async.config.checks import check_boolean, check_integer, encoded, shown
from smolvm_async.controls.files.paths import check_guest_path, without_slash
from smolvm_async.errors import ConfigError, FileTransferError
from smolvm_async.foundation.tasks import in_background

if TYPE_CHECKING:
    from smolvm_async.controls.file_info import FileInfo

MOST = 64 << 20  # bytes that read_file() returns, unless the caller names a length
BIG = 1 << 20  # bytes; a thread decodes more, so as not to block the event loop


class FileAccess(Protocol):
    """A way to the files of a guest. Every method raises `FileTransferError` if it fails."""

    async def read(self, path: str, offset: int, length: int | None) -> bytes:
        """Read a file; without a length, refuse a file of more than `MOST` bytes."""

    async def write(self, path: str, content: bytes, mode: int | None, make_dirs: bool) -> None:
        """Replace a file as a whole, or not at all."""

    async def entries(self, path: str) -> list[FileInfo]:
        """Return the files in a directory, sorted by name."""

    async def remove(self, path: str, recursive: bool) -> None:
        """Remove a file, or a directory."""

    async def make_directory(self, path: str, parents: bool) -> None:
        """Make a directory."""

    async def exists(self, path: str) -> bool:
        """Return whether a path leads to a file or a directory."""


class Contents:
    """`AsyncSmolVM`'s files as bytes and text. A relative path or a wrong type is a `ConfigError`.

    Each method raises `FileTransferError` if the guest refuses, and `ConnectionLostError`,
    `VMTimeoutError` and `VMNotRunningError` as `run()` does.
    """

    async def _file_access(self, feature: str) -> FileAccess:
        """Wait until the guest is ready, and return the way to its files.

        Args:
            feature: The method that needs the files.
        """
        raise NotImplementedError

    def _has_windows_paths(self) -> bool:
        """Return whether the guest's paths are those of Windows."""
        return False

    def _require(self, feature: str) -> None:
        """Check that the guest supports this feature, and that the VM runs."""
        raise NotImplementedError

    @overload
    async def read_file(
        self, path: str, *, text: Literal[True] = True, offset: int = 0, length: int | None = None
    ) -> str: ...

    @overload
    async def read_file(
        self, path: str, *, text: Literal[False], offset: int = 0, length: int | None = None
    ) -> bytes: ...

    async def read_file(
        self, path: str, *, text: bool = True, offset: int = 0, length: int | None = None
    ) -> str | bytes:
        """Return the content of a file in the guest.

        Args:
            path: The absolute path of the file.
            text: Whether to return text, which must be UTF-8, or bytes.
            offset: The number of bytes to skip.
            length: The maximum number of bytes to return. By default all, and a file of more than
                64 MiB is an error.

        Raises:
            FileTransferError: The file cannot be read, is too long, or is not UTF-8.
            ConnectionLostError, VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("read_file")
        path = check_guest_path(path, "path", windows=self._has_windows_paths())
        check_boolean("text", text)
        check_integer("offset", offset, 0, None, "bytes, 0 or more")
        if length is not None:
            check_integer("length", length, 0, None, "bytes, 0 or more")
        content = await (await self._file_access("read_file")).read(path, offset, length)
        if not text:
            return content
        try:
            return await in_background(content.decode) if len(content) > BIG else content.decode()
        except UnicodeDecodeError as error:
            raise FileTransferError(
                f"{path!r} is not UTF-8 text: {error.reason} at byte {offset + error.start}.",
                hint="For bytes, pass text=False.",
            ) from error

    async def write_file(
        self, path: str, content: str | bytes, *, mode: int | None = None, make_dirs: bool = True
    ) -> None:
        """Write a file in the guest. A reader finds the old content or the new one, never a part.

        A link stays a link: the file that it leads to is written.

        Args:
            path: The absolute path of the file.
            content: The new content; text is encoded as UTF-8.
            mode: The permissions, such as 0o600. By default, an existing file keeps its own, and a
                new file gets the guest's default.
            make_dirs: Whether to make missing directories above the file.

        Raises:
            FileTransferError: The file cannot be written, as on a full disk.
            ConnectionLostError, VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("write_file")
        path = check_guest_path(path, "path", windows=self._has_windows_paths())
        if path.endswith("/"):
            raise ConfigError(
                f"path={shown(path)} is wrong: a file's path has no slash at its end."
            )
        if mode is not None:
            check_integer("mode", mode, 0, 0o7777, "permissions, from 0 to 0o7777")
        check_boolean("make_dirs", make_dirs)
        data = encoded(content) if isinstance(content, str) else content
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ConfigError(
                f"content={shown(content)} is wrong: pass bytes, or str without lone surrogates."
            )
        await (await self._file_access("write_file")).write(path, bytes(data), mode, make_dirs)

    async def list_files(self, path: str) -> list[FileInfo]:
        """Return the files in a directory of the guest, sorted by name.

        Raises:
            FileTransferError: The path is not a directory, or cannot be read.
            ConnectionLostError, VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("list_files")
        path = check_guest_path(path, "path", windows=self._has_windows_paths())
        return await (await self._file_access("list_files")).entries(path)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link or a directory in the guest.

        Args:
            path: The absolute path.
            recursive: Whether to remove a directory with its contents. Otherwise, the directory
                must be empty.

        Raises:
            FileTransferError: The path does not exist, or cannot be removed.
            ConnectionLostError, VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("remove")
        path = without_slash(check_guest_path(path, "path", windows=self._has_windows_paths()))
        check_boolean("recursive", recursive)
        await (await self._file_access("remove")).remove(path, recursive)

    async def make_directory(self, path: str, *, parents: bool = True) -> None:
        """Make a directory in the guest.

        Args:
            path: The absolute path.
            parents: Whether to make missing directories above, and to accept a directory that
                exists.

        Raises:
            FileTransferError: The directory cannot be made.
            ConnectionLostError, VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("make_directory")
        path = without_slash(check_guest_path(path, "path", windows=self._has_windows_paths()))
        check_boolean("parents", parents)
        await (await self._file_access("make_directory")).make_directory(path, parents)

    async def exists(self, path: str) -> bool:
        """Return whether a file or a directory exists in the guest. A dangling link does not.

        Raises:
            FileTransferError: The guest does not tell, as without a permission.
            ConnectionLostError, VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("exists")
        path = check_guest_path(path, "path", windows=self._has_windows_paths())
        return await (await self._file_access("exists")).exists(path)


def check_length(size: int) -> None:
    """Check that `read_file()` may return `size` bytes."""
    if size > MOST:
        raise FileTransferError(
            "it is longer than the 64 MiB that read_file() returns at once.",
            hint="Read it in parts, with offset= and length=, or use download_file().",
        )
