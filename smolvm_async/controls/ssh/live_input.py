r"""The input of a process in a Windows guest over SSH, which the caller writes while it runs.

PowerShell reads its standard input to the end before it runs a statement, as the server's shell
(`DefaultShell`), too. So the session's own input cannot be live. Each part of the input is a file
in the command's directory, which `runner.ps1` reads and removes; an empty part ends the input.

The `sftp-server` of Windows opens a file for writing without any sharing (`fileio_open()` in
Win32-OpenSSH's fileio.c): a growing file that PowerShell has open could not be written. So a part
is written under another name, and gets its own name when it is whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from smolvm_async.controls.commands.transport import Stream
from smolvm_async.controls.ssh.execution import Execution, MarkedExecution
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.transfer import explanation
from smolvm_async.foundation.tasks import take_exception

if TYPE_CHECKING:
    from asyncssh import SFTPClient

PART = 1 << 20  # bytes of a part at most
AHEAD = 16  # parts that may wait for the process: then the caller waits
LOOK = 0.05  # seconds between two looks whether PowerShell has made the directory, or read a part
ATTEMPTS = 100  # to write a part: while PowerShell removes the directory, the server refuses it


class FedExecution(MarkedExecution):
    """A running command whose input is in files of the guest.

    Args:
        receive, link, signaller, content: See `MarkedExecution`.
        directory: The command's directory, as a path for SFTP. PowerShell makes the directory.
    """

    def __init__(
        self,
        receive: Callable[[Stream, bytes], None],
        link: Link,
        signaller: Callable[[str], str],
        content: bytes,
        directory: str,
    ) -> None:
        super().__init__(receive, link, signaller, content)
        self._directory = directory
        self._number = 0  # of the next part
        self._complete = False
        self._turn = asyncio.Lock()
        self._session = AsyncExitStack()
        self._sftp: SFTPClient | None = None
        self.ended.add_done_callback(self._close)

    async def begin(self) -> None:
        """Write the command itself to the session's input."""
        await Execution.feed(self, self._content)
        Execution.end_input(self)

    async def feed(self, content: bytes) -> None:
        """Write a part of the standard input; see `Execution.feed()`.

        A part that has begun is written whole even if the caller is cancelled: the process may have
        read the part.
        """
        for start in range(0, len(content), PART):
            await asyncio.shield(self._write_later(content[start : start + PART]))

    def end_input(self) -> None:
        """End the standard input after all parts, in the background."""
        self._write_later(b"")

    def _write_later(self, part: bytes) -> asyncio.Task[None]:
        writing = self._link.go_on(self._write(part))
        writing.add_done_callback(take_exception)
        return writing

    async def _write(self, part: bytes) -> None:
        async with self._turn:
            if self._complete or self.ended.done():
                return
            self._complete = not part
            try:
                if self._sftp is None:
                    shared = self._link.shared_sftp()
                    self._sftp = await self._session.enter_async_context(shared)
                await self._place(self._sftp, part)
            except Exception as error:
                if self.ended.done():
                    return
                subject = "the input of the process"
                raise explanation(error, self._link, subject) or error from error

    async def _place(self, sftp: SFTPClient, part: bytes) -> None:
        import asyncssh

        number, attempts = self._number, ATTEMPTS
        path = f"{self._directory}/{number}"
        self._number += 1
        while not self.ended.done():
            try:
                unread = f"{self._directory}/{number - AHEAD}"
                if number < AHEAD or not await sftp.exists(unread):
                    async with sftp.open(f"{path}.part", "wb") as file:
                        await file.write(part)
                    await sftp.posix_rename(f"{path}.part", path)
                    return
            except asyncssh.SFTPNoSuchFile:  # PowerShell has not made the directory, or removes it
                pass
            except asyncssh.SFTPError:
                attempts -= 1
                if not attempts:
                    raise
            await asyncio.wait([self.ended], timeout=LOOK)

    def _close(self, _: object) -> None:
        self._link.go_on(self._close_session())

    async def _close_session(self) -> None:
        async with self._turn:  # a file that is open could not be removed
            await self._session.aclose()
