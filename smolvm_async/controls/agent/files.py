"""Files in the guest through its agent: open, read, write. A file is closed whatever happens."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from smolvm_async.controls.agent.session import Session
from smolvm_async.errors import GuestAgentError
from smolvm_async.qemu.guest_agent import GuestAgent

PIECE = 1 << 16  # bytes to read or write at once; a reply has at most 128 KiB

T = TypeVar("T")


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
        self._handle = handle

    async def read(self) -> tuple[bytes, bool]:
        """Return the next bytes, and whether these are the last ones, for now."""
        command = "guest-file-read"
        reply = await self._call(command, count=PIECE)
        try:
            data = base64.b64decode(field(reply, "buf-b64", str, command), validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if len(data) != field(reply, "count", int, command) or len(data) > PIECE:
            message = "the guest agent's bytes of a file are not as many as it says"
            raise GuestAgentError(message, command=command)
        return data, field(reply, "eof", bool, command) or not data

    async def write(self, content: bytes) -> None:
        """Write all of `content`."""
        command = "guest-file-write"
        view = memoryview(content)
        while view:
            piece = base64.b64encode(view[:PIECE]).decode()
            count = field(await self._call(command, **{"buf-b64": piece}), "count", int, command)
            if not 0 < count <= PIECE:
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
        return await self._agent.execute(command, {"handle": self._handle, **arguments})


@asynccontextmanager
async def open_file(session: Session, path: str, mode: str) -> AsyncIterator[GuestFile]:
    """Open a file in the guest, as `fopen` does, and close it at the end of the block.

    Raises:
        GuestAgentError: The guest cannot open the file.
    """
    command = "guest-file-open"

    async def begin() -> int:
        handle = await session.agent.execute(command, {"path": path, "mode": mode})
        if type(handle) is not int:
            message = f"the guest agent's result of {command} is not a number"
            raise GuestAgentError(message, command=command)
        return handle

    async def end() -> None:
        await session.agent.execute("guest-file-close", {"handle": await opening})

    opening = asyncio.ensure_future(begin())  # a cancelled call must not lose the handle
    try:
        yield GuestFile(session.agent, await asyncio.shield(opening))
    finally:
        if mode.startswith("r") and "+" not in mode:
            session.go_on(end())  # the caller has what it wants
        else:
            await session.end(end())
