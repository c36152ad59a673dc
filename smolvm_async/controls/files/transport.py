"""A way to a guest's files: SFTP (`ssh/transfer.py`), or the agent (`agent/transfer.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from smolvm_async.controls.files.copying import Readable, TransferMeter
from smolvm_async.controls.files.tree import Entry


class Upload(Protocol):
    """A transfer into the guest.

    Attributes:
        target: The path in the guest; `place()` may append the source's name.
    """

    target: str

    async def place(self, *, make_dirs: bool) -> None:
        """Find the path to copy to, and make missing directories above the path."""

    async def copy(self, tree: Sequence[Entry], meter: TransferMeter) -> None:
        """Copy everything under a temporary name."""

    async def publish(self) -> None:
        """Rename to the final name; merge into a directory that exists already."""

    async def discard(self) -> None:
        """Remove the temporary copy, if the guest still answers."""

    async def met_full_disk(self, error: BaseException) -> bool:
        """Return whether a full disk in the guest is the reason for an error."""


class GuestFiles(Readable, Protocol):
    """The files of a guest, for one transfer.

    Attributes:
        turn: Held while the user's variables are read and written.
        windows: Whether the guest is Windows.
    """

    turn: asyncio.Lock
    windows: bool

    async def tree(self, source: str) -> list[Entry]:
        """List a file or a directory; refuse names that could lead out of the tree."""

    def upload(self, source: Path, target: str) -> Upload:
        """Return a transfer into the guest, which has not begun."""

    async def read_own(self, name: str) -> bytes:
        """Return the content of a small file in the user's home; nothing if there is none."""

    async def write_own(self, name: str, content: bytes) -> None:
        """Replace a small file in the user's home, which only this user can read."""

    def explanation(self, error: Exception, subject: str) -> Exception | None:
        """Return the error to raise instead of an error of this way; `None` for other errors."""


class OverFiles:
    """Base class of the controls that copy files."""

    async def _files(self, feature: str) -> AbstractAsyncContextManager[GuestFiles]:
        """Wait until the guest is ready, and return the way to its files.

        Args:
            feature: The method that needs the files.
        """
        raise NotImplementedError

    def _require(self, feature: str) -> None:
        """Check that the guest supports this feature, and that the VM runs."""
        raise NotImplementedError

    def _has_windows_paths(self) -> bool:
        """Return whether the guest's paths are those of Windows."""
        return False
