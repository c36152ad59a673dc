"""Files in the guest through its agent: open, read, write. A file is closed whatever happens."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from smolvm_async.controls.agent.session import Session
from smolvm_async.errors import ConnectionLostError, GuestAgentError
from smolvm_async.foundation.tasks import take_exception
from smolvm_async.qemu.guest_agent import GuestAgent, result_of

PIECE = 1 << 16  # bytes to read at once; a reply has at most 128 KiB
SENT = 1 << 18  # bytes to write at once; under TCG, most of the time the agent parses the JSON

OPEN = "guest-file-open"
UNKNOWN = "has not been found"  # the agent's words for a handle that it does not know

T = TypeVar("T")
Request = tuple[str, dict[str, Any]]  # a command of the agent, and its arguments


def field(reply: object, name: str, kind: type[T], command: str) -> T:
    """Return a field of an agent's result, which a hostile guest has written.

    Raises:
        GuestAgentError: The result has no such field, or the field has another type.
    """
    value = reply.get(name) if isinstance(reply, dict) else None
    if type(value) is not kind:
        message = f"the guest agent's result of {command} has no {name}"
        raise GuestAgentError(message, command=command)
    return value


class GuestFile:
    """An open file in the guest."""

    def __init__(self, agent: GuestAgent, handle: int) -> None:
        self._agent = agent
        self.handle = handle

    async def read(self) -> tuple[bytes, bool]:
        """Return the next bytes, and whether these are the last ones, for now."""
        ((data, is_end),) = await read_each(self._agent, [self])
        return data, is_end

    async def write(self, content: bytes) -> None:
        """Write all of `content`."""
        command = "guest-file-write"
        view = memoryview(content)
        while view:
            piece = base64.b64encode(view[:SENT]).decode()
            count = field(await self._call(command, **{"buf-b64": piece}), "count", int, command)
            if not 0 < count <= SENT:
                message = f"the guest agent wrote {count} bytes of a piece of a file"
                raise GuestAgentError(message, command=command)
            view = view[count:]

    async def flush(self) -> None:
        """Hand all that was written to the guest's kernel: only this shows that a disk is full."""
        await self._call("guest-file-flush")

    async def seek(self, offset: int, whence: str) -> int:
        """Change the position, as `lseek` does, and return it. `whence` is set, cur or end."""
        command = "guest-file-seek"
        reply = await self._call(command, offset=offset, whence=whence)
        return field(reply, "position", int, command)

    async def _call(self, command: str, **arguments: object) -> Any:
        request = (command, {"handle": self.handle, **arguments})
        (reply,) = await self._agent.execute_all([request])
        return _result(command, reply)


async def read_each(agent: GuestAgent, files: Sequence[GuestFile]) -> list[tuple[bytes, bool]]:
    """Read from files in one round trip; see `GuestFile.read()`."""
    command = "guest-file-read"
    requests = [(command, {"handle": file.handle, "count": PIECE}) for file in files]
    return [_content(_result(command, reply)) for reply in await agent.execute_all(requests)]


def _result(command: str, reply: Mapping[str, Any]) -> Any:
    """Return the result for an open file.

    Raises:
        ConnectionLostError: The agent does not know the file: it has started again.
    """
    try:
        return result_of(command, reply)
    except GuestAgentError as error:
        if UNKNOWN not in error.message:
            raise
        message = "the guest agent has started again, and does not have the file open any more"
        raise ConnectionLostError(message) from error


def _content(result: object) -> tuple[bytes, bool]:
    command = "guest-file-read"
    try:
        data = base64.b64decode(field(result, "buf-b64", str, command), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != field(result, "count", int, command) or len(data) > PIECE:
        message = "the guest agent's bytes of a file are not as many as it says"
        raise GuestAgentError(message, command=command)
    return data, field(result, "eof", bool, command) or not data


@asynccontextmanager
async def open_file(session: Session, path: str, mode: str) -> AsyncIterator[GuestFile]:
    """Open a file in the guest; see `open_files()`."""
    async with open_files(session, [path], mode) as (file,):
        yield file


@asynccontextmanager
async def open_files(
    session: Session, paths: Sequence[str], mode: str
) -> AsyncIterator[list[GuestFile]]:
    """Open files in the guest, as `fopen` does, and close them at the end of the block.

    One round trip opens the files, and one closes them.

    Raises:
        GuestAgentError: The guest cannot open one of the files.
    """
    async with opening(session, paths, mode) as (replies, files):
        for reply in replies:
            if type(result_of(OPEN, reply)) is not int:
                message = f"the guest agent's result of {OPEN} is not a number"
                raise GuestAgentError(message, command=OPEN)
        yield files


@asynccontextmanager
async def opening(
    session: Session, paths: Sequence[str], mode: str, after: Sequence[Request] = ()
) -> AsyncIterator[tuple[list[dict[str, Any]], list[GuestFile]]]:
    """Send requests and open files in one round trip; close the files at the end of the block.

    Yields:
        The agent's replies to all of that, and the files that the guest has opened.
    """
    files: list[GuestFile] = []

    async def begin() -> list[dict[str, Any]]:
        requests = [*after, *((OPEN, {"path": path, "mode": mode}) for path in paths)]
        replies = await session.agent.execute_all(requests)
        handles = [reply.get("return") for reply in replies[len(after) :]]
        files.extend(GuestFile(session.agent, each) for each in handles if type(each) is int)
        return replies

    async def end() -> None:
        await asyncio.wait([beginning])
        requests = [("guest-file-close", {"handle": file.handle}) for file in files]
        if requests:
            await session.agent.execute_all(requests)

    beginning = asyncio.ensure_future(begin())  # a cancelled call must not lose the handles
    beginning.add_done_callback(take_exception)
    try:
        yield await asyncio.shield(beginning), files
    finally:
        if mode.startswith("r") and "+" not in mode:
            session.go_on(end())  # the caller has what it wants
        else:
            await session.end(end())
