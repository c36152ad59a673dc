"""The MCP server: the tools of a session, over stdin and stdout.

The SDK's own stdio transport reads stdin in a thread, which nothing can cancel: a server that is
ended by a signal would wait for its client, and its VMs would run on. So the lines come and go
through asyncio's pipes here.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError

from smolvm_async.agents.sandboxes import Sandboxes, SessionLimits, on_progress
from smolvm_async.agents.tools import Content, Tools
from smolvm_async.config.checks import shown
from smolvm_async.controls.desktop.picture import Screenshot
from smolvm_async.errors import ConfigError, HostError, SmolVMError
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.progress import Progress
from smolvm_async.foundation.tasks import end_tasks, take_exception

logger = get_logger(__name__)

NAME = "smolvm-async"
MAX_LINE = 32 << 20  # bytes of a message from the client; a longer one ends the session
INSTRUCTIONS = """\
Sandboxes are virtual machines that you may break. Create one, run commands and use files in \
it, or look at the screen and use mouse and keyboard. Results are short and say \
how to get more. Delete sandboxes that you no longer need: their number, memory and lifetime are \
limited. All end with the session."""


async def serve(limits: SessionLimits) -> None:
    """Serve one client over stdin and stdout, until it disconnects; delete its sandboxes then.

    Raises:
        HostError: The package `mcp` is missing.
        ConfigError: stdin and stdout do not lead to an MCP client.
    """
    try:
        from mcp.server.lowlevel import Server
        from mcp.server.stdio import stdio_server
    except ImportError as error:
        raise HostError(
            f"The MCP server needs the package mcp ({error}).",
            hint="pip install 'smolvm-async[mcp]'",
            missing=("mcp",),
        ) from error
    async with pipes() as (lines, writer), Sandboxes(limits) as sandboxes:
        handlers = make_handlers(Tools(sandboxes))
        server: Any = Server(
            NAME, version=version("smolvm-async"), instructions=INSTRUCTIONS, **handlers
        )
        transport: Any = stdio_server  # it takes any objects with these methods

        async def speak() -> None:
            async with transport(lines, writer) as streams:
                await server.run(*streams, server.create_initialization_options())

        # A task of its own: the SDK turns a cancellation between two messages into other errors.
        speaking = asyncio.create_task(speak())
        leaving = asyncio.create_task(lines.ended.wait())
        try:
            await asyncio.wait([speaking, leaving], return_when=asyncio.FIRST_COMPLETED)
            failure = take_exception(speaking) if speaking.done() else None
        finally:
            speaking.cancel()
            # First of all: a call ends at once if its VM is gone, and clients wait for 2 seconds.
            await sandboxes.delete_all()
            await end_tasks(speaking, leaving)
        if failure is not None:
            logger.error("the session has failed", exc_info=failure)


def make_handlers(tools: Tools) -> dict[str, Any]:
    """Return the SDK's handlers of requests for the tools."""
    from mcp.server.mcpserver import Image, MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.types import CallToolResult, ListToolsResult, TextContent

    registry: Any = MCPServer(NAME)  # derives the schemas and checks the arguments

    def picture(part: str | Screenshot) -> Any:
        return part if isinstance(part, str) else Image(data=part.png, format="png")

    def tool(method: Callable[..., Awaitable[Content]]) -> Callable[..., Awaitable[list[Any]]]:
        @functools.wraps(method)
        async def call(*args: Any, **arguments: Any) -> list[Any]:
            return [picture(part) for part in await method(*args, **arguments)]

        return call

    names = [name for name in vars(Tools) if not name.startswith("_")]
    for name in names:
        registry.add_tool(tool(getattr(tools, name)), structured_output=False)

    async def list_tools(context: Any, params: Any) -> Any:
        return ListToolsResult(tools=await registry.list_tools())

    async def call_tool(context: Any, params: Any) -> Any:
        arguments = params.arguments or {}
        try:
            if params.name in names:
                check_names(getattr(Tools, params.name), arguments)
            async with progress_to(context.session):
                return await registry.call_tool(params.name, arguments)
        except (ToolError, ConfigError) as error:
            text = explained(params.name, error)
        return CallToolResult(content=[TextContent(type="text", text=text)], is_error=True)

    return {"on_list_tools": list_tools, "on_call_tool": call_tool}


@asynccontextmanager
async def progress_to(client: Any) -> AsyncIterator[None]:
    """Tell the client the progress of the block, if the client has asked for it.

    Args:
        client: The SDK's session of a request.
    """
    began, latest = time.monotonic(), [""]
    news = asyncio.Event()

    def note(progress: Progress) -> None:
        done, total = progress.done, progress.total
        share = f": {100 * done // total} %" if done is not None and total else ""
        latest[0] = progress.message + share
        news.set()

    async def tell() -> None:
        while True:
            await news.wait()
            news.clear()
            # The number must grow, and the parts of the work have different units.
            await client.report_progress(time.monotonic() - began, message=latest[0])

    token, telling = on_progress.set(note), asyncio.create_task(tell())
    try:
        yield
    finally:
        on_progress.reset(token)
        await end_tasks(telling)


def check_names(method: Callable[..., object], arguments: Iterable[str]) -> None:
    """Refuse arguments that a tool does not have: the SDK would ignore them."""
    known = [name for name in inspect.signature(method).parameters if name != "self"]
    for name in arguments:
        if name not in known:
            raise ConfigError(f"{shown(name)} is not an argument: use {', '.join(known)}.")


def explained(tool: str, error: Exception) -> str:
    """Return the message for the model; log an error that is not the model's fault."""
    cause = error.__cause__ or error
    if isinstance(cause, SmolVMError):
        return f"{type(cause).__name__}: {cause}"
    if isinstance(cause, ValidationError):
        found = cause.errors(include_url=False, include_context=False)
        return "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in found)
    if cause is not error:
        logger.error("the tool %s failed", tool, exc_info=cause)
    return str(error)


class Lines:
    """The client's messages: an async iterator of the lines of stdin.

    Attributes:
        ended: Set once the client has disconnected.
    """

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.ended = asyncio.Event()
        self._reader = reader

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> str:
        try:
            line = await self._reader.readline()
        except ValueError:
            logger.error("the client sent a message of more than %d bytes", MAX_LINE)
            line = b""
        if not line:
            self.ended.set()
            raise StopAsyncIteration
        return line.decode(errors="replace")


class Writer:
    """The server's messages, for stdout."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def write(self, text: str) -> None:
        """Send a text, unless the client has closed stdout: then stdin ends the session, too."""
        if not self._writer.is_closing():
            self._writer.write(text.encode())

    async def flush(self) -> None:
        """Wait until the client takes more."""
        with suppress(ConnectionError):
            await self._writer.drain()


@asynccontextmanager
async def pipes() -> AsyncIterator[tuple[Lines, Writer]]:
    """Take stdin and stdout for the messages during the block.

    Meanwhile descriptor 0 is empty and descriptor 1 is stderr, so nothing else reads or writes a
    message.
    """
    check_pipe(0, "stdin")
    check_pipe(1, "stdout")
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=MAX_LINE)
    ours = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    incoming, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours[0], "rb", 0)
    )
    outgoing, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), os.fdopen(ours[1], "wb", 0)
    )
    try:
        yield Lines(reader), Writer(asyncio.StreamWriter(outgoing, protocol, None, loop))
    finally:
        incoming.close()
        outgoing.close()


def check_pipe(fd: int, name: str) -> None:
    """Check that an MCP client is at the other end of a standard stream."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{name} is not a pipe: an MCP client starts this command, and speaks with it over "
            "stdin and stdout. Name the command in the client's settings: "
            '{"command": "smolvm-async", "args": ["mcp"]}.'
        )
