"""The output of a command: two files in the guest, which are read while the command runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

from smolvm_async.controls.agent.files import GuestFile, Request, open_files, opening, read_each
from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.agent.system import System
from smolvm_async.controls.commands.transport import Stream
from smolvm_async.errors import ConnectionLostError, GuestAgentError

SOME = 1 << 20  # bytes of output to read between two looks at a command
STREAMS: tuple[Stream, Stream] = ("stdout", "stderr")


class Output:
    """The output of a command.

    Attributes:
        size: The bytes of both streams so far.
        may_be_missing: Whether the command was perhaps killed before it made the files.
    """

    def __init__(
        self,
        session: Session,
        system: System,
        stem: str,
        receive: Callable[[Stream, bytes], None],
    ) -> None:
        self._session = session
        self._paths = [system.file(stem, name) for name in ("out", "err")]
        self._keeps_open = system.KEEPS_OPEN
        self._receive = receive
        self._positions: dict[Stream, int] = dict.fromkeys(STREAMS, 0)
        self._files: list[GuestFile] = []  # that stay open
        self._wanted = asyncio.Event()
        self._wanted.set()
        self.may_be_missing = False

    @property
    def size(self) -> int:
        """See the class."""
        return sum(self._positions.values())

    def pause(self) -> None:
        """Stop reading: the output waits in the guest's files."""
        self._wanted.clear()

    def resume(self) -> None:
        """Continue to read."""
        self._wanted.set()

    async def open_after(self, stack: AsyncExitStack, request: Request) -> dict[str, Any]:
        """Send a request and open the files, if they are there, in one round trip.

        Returns:
            The agent's reply to the request. The stack closes the files.
        """
        context = opening(self._session, self._paths, "r", [request])
        (reply, *_), files = await stack.enter_async_context(context)
        if len(files) == len(self._paths):
            self._files = files
        return reply

    async def read(self, stack: AsyncExitStack, *, last: bool) -> None:
        """Pass on the new output, at last all of it. The stack closes the files.

        Raises:
            ConnectionLostError: The command has ended, and the guest does not have the files.
        """
        try:
            async with AsyncExitStack() as soon:
                keeping = stack if self._keeps_open else soon
                files = self._files or await keeping.enter_async_context(
                    open_files(self._session, self._paths, "r")
                )
                if self._keeps_open:
                    self._files = files
                else:
                    await self._skip(files)
                await self._read(files, last=last)
        except GuestAgentError as error:
            if not error.error_class:  # the agent did not refuse: its answer makes no sense
                raise
            if not last or (self.may_be_missing and not self.size):
                return  # the files are not made yet, or are being written
            hint = "Is the disk of the guest full, or its directory for temporary files read-only?"
            message = f"the guest did not keep the command's output: {error.message}."
            raise ConnectionLostError(message, hint=hint) from error

    async def _skip(self, files: list[GuestFile]) -> None:
        for file, position in zip(files, self._positions.values(), strict=True):
            if position:
                await file.seek(position, "set")

    async def _read(self, files: list[GuestFile], *, last: bool) -> None:
        await self._wanted.wait()
        first = await read_each(self._session.agent, files)
        for stream, file, (data, is_end) in zip(STREAMS, files, first, strict=True):
            self._pass_on(stream, data)
            if not is_end:
                await self._read_more(stream, file, last=last)

    async def _read_more(self, stream: Stream, file: GuestFile, *, last: bool) -> None:
        """Pass on a part of a file, or at last the rest that is there: some programs never stop."""
        rest = SOME
        if last:
            position = self._positions[stream]
            rest = await file.seek(0, "end") - position
            await file.seek(position, "set")
        is_end = False
        while rest > 0 and not is_end:
            await self._wanted.wait()
            data, is_end = await file.read()
            self._pass_on(stream, data)
            rest -= len(data)

    def _pass_on(self, stream: Stream, data: bytes) -> None:
        if data:
            self._positions[stream] += len(data)
            self._receive(stream, data)
