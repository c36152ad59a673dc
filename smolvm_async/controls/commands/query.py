"""The library's own short programs in a guest: run to their end, with bounded output."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

from smolvm_async.controls.commands.transport import Command, Stream, Transport
from smolvm_async.errors import ConnectionLostError

MOST = 16 << 20  # bytes of output; a hostile guest may write without end


class Answer(NamedTuple):
    """The exit code and the output of a program."""

    exit_code: int
    stdout: bytes
    stderr: bytes

    @property
    def reason(self) -> str:
        """The program's error output, for a message."""
        return self.stderr.decode(errors="replace").strip()


async def query(
    transport: Transport, program: str, env: Mapping[str, str], content: bytes = b""
) -> Answer:
    """Run a program for the guest's shell to its end. A cancellation kills the program.

    Raises:
        ConnectionLostError: The guest was lost, or has written more than 16 MiB.
    """
    output: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    flooded: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def receive(stream: Stream, data: bytes) -> None:
        if len(output[stream]) + len(data) <= MOST:
            output[stream] += data
        elif not flooded.done():
            flooded.set_result(None)

    await transport.pauses.until_open()
    command = Command(program, "raw", env, content)
    async with transport.executing(command, receive, lambda _: None) as execution:
        await execution.write()
        await asyncio.wait({execution.ended, flooded}, return_when=asyncio.FIRST_COMPLETED)
    if flooded.done():
        raise ConnectionLostError(f"the guest answered with more than {MOST >> 20} MiB")
    if execution.exit_code is None:
        raise transport.lost(execution)
    return Answer(execution.exit_code, bytes(output["stdout"]), bytes(output["stderr"]))
