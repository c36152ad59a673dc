"""The standard streams of this program as bytes, and its terminal, for a process in a guest.

The streams are shared with other programs, so they stay in blocking mode: the code waits until a
stream is ready, and then reads or writes no more than goes at once.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress

from smolvm_async.controls.commands.processes import GuestProcess, Terminal

STDIN, STDOUT, STDERR = 0, 1, 2
BLOCK = 1 << 16  # bytes to read at once
ROOM = select.PIPE_BUF  # bytes that fit into a pipe that is ready

# Leave the alternate screen, show the cursor, end pasting and the mouse's reports, no colours.
RESET = b"\x1b[?1049l\x1b[?25h\x1b[?2004l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[0m\r\n"


async def connect(process: GuestProcess) -> int:
    """Connect the standard streams to a process until the process ends; return its exit code.

    Raises:
        BrokenPipeError: The reader of this program's output is gone.
    """
    feeding = asyncio.ensure_future(_feed(process, _stdin()))
    try:
        await asyncio.gather(_drain(process.stdout, STDOUT), _drain(process.stderr, STDERR))
        return await process.wait()
    finally:
        feeding.cancel()


async def connect_terminal(terminal: Terminal) -> int | None:
    """Connect this program's terminal until the process ends; return its exit code.

    Return `None` if the user left by `~.`, or this program's terminal is gone.
    """
    with _raw_terminal() as mark_ended:
        tasks = [
            asyncio.ensure_future(work)
            for work in (
                _drain(terminal.stdout, STDOUT),
                _feed(terminal, until_escape(_stdin())),
                _follow_size(terminal),
            )
        ]
        output, feeding, _ = tasks
        try:
            await asyncio.wait({output, feeding}, return_when=asyncio.FIRST_COMPLETED)
            if not output.done():
                return None
            await output
            code = await terminal.wait()
            mark_ended()
            return code
        finally:
            for task in tasks:
                task.cancel()


async def _feed(process: GuestProcess, chunks: AsyncIterator[bytes]) -> None:
    async for chunk in chunks:
        await process.write(chunk)
    process.close_input()


async def _drain(reader: asyncio.StreamReader, fd: int) -> None:
    while data := await reader.read(BLOCK):
        await _write(fd, data)


async def _stdin() -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    with suppress(OSError):  # a closed stream, or a terminal that is gone
        while True:
            await _until_ready(STDIN, loop.add_reader, loop.remove_reader)
            with suppress(BlockingIOError):  # another program has read before
                data = os.read(STDIN, BLOCK)
                if not data:
                    return
                yield data


async def _write(fd: int, data: bytes) -> None:
    loop, rest = asyncio.get_running_loop(), memoryview(data)
    while rest:
        if not select.select((), (fd,), (), 0)[1]:
            await _until_ready(fd, loop.add_writer, loop.remove_writer)
        with suppress(BlockingIOError):  # another program has written before
            rest = rest[os.write(fd, rest[:ROOM]) :]


async def _until_ready(fd: int, add: Callable[..., None], remove: Callable[[int], object]) -> None:
    ready = asyncio.Event()
    try:
        add(fd, ready.set)
    except PermissionError:  # a file is always ready; epoll refuses files
        return
    try:
        await ready.wait()
    finally:
        remove(fd)


async def until_escape(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the user's input until Enter, `~`, `.`, as in ssh; `~~` sends one `~`."""
    last, waiting = b"\r", False  # whether a `~` waits for the next character
    async for chunk in chunks:
        passed = bytearray()
        for byte in (chunk[index : index + 1] for index in range(len(chunk))):
            if waiting:
                waiting = False
                if byte == b".":
                    yield bytes(passed)
                    return
                passed += b"~" if byte == b"~" else b"~" + byte
            elif byte == b"~" and last in b"\r\n":
                waiting = True
            else:
                passed += byte
            last = byte
        yield bytes(passed)


async def _follow_size(terminal: Terminal) -> None:
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    try:
        while True:
            await changed.wait()
            changed.clear()
            await terminal.resize(*terminal_size())
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


def terminal_size() -> tuple[int, int]:
    """Return the columns and rows of the terminal; 80 and 24 if it does not know."""
    columns, rows = os.get_terminal_size(STDIN)
    return columns or 80, rows or 24


@contextmanager
def _raw_terminal() -> Iterator[Callable[[], None]]:
    """Pass on every key during the block; yield a function that notes a regular end."""
    before = termios.tcgetattr(STDIN)
    ended = False

    def mark_ended() -> None:
        nonlocal ended
        ended = True

    try:
        tty.setraw(STDIN, termios.TCSANOW)
        yield mark_ended
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(STDIN, termios.TCSANOW, before)
        if not ended and sys.stdout.isatty():
            with suppress(OSError):
                os.write(STDOUT, RESET)
