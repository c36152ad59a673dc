"""A way to run commands in a guest: over SSH (`ssh/execution.py`), or by the guest's agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, NamedTuple, Protocol

from smolvm_async.errors import SmolVMError
from smolvm_async.qemu.pauses import Pauses

Stream = Literal["stdout", "stderr"]
ShellKind = Literal["raw", "login", "cmd"]


class TerminalKind(NamedTuple):
    """A terminal: its name for the variable `TERM`, and its size in characters."""

    term: str
    columns: int
    rows: int


class Command(NamedTuple):
    """A command for a shell of the guest.

    Attributes:
        text: The command, for a shell.
        shell: See `Commands.run()`.
        env: The command's own variables.
        content: The standard input; `None` if the caller writes it while the command runs.
        cwd: The working directory; `None` for the home of the user.
        words: A program and its arguments, of which `text` is the command for a POSIX shell.
        detached: Whether the command goes on after the caller's block, without input and output.
        terminal: The terminal of the command, if it has one.
    """

    text: str
    shell: ShellKind
    env: Mapping[str, str]
    content: bytes | None
    cwd: str | None = None
    words: tuple[str, ...] | None = None
    detached: bool = False
    terminal: TerminalKind | None = None


class Execution(Protocol):
    """A running command. Only a command without `content` may be fed.

    Attributes:
        exit_code: The exit code as in `subprocess`: negative for a signal; `None` while the command
            runs, or if the guest was lost before it reported the exit code.
        ended: Done when the command is over.
    """

    exit_code: int | None
    ended: asyncio.Future[None]

    async def write(self) -> None:
        """Write all of the command's standard input; stop early if the command ends."""

    async def feed(self, content: bytes) -> None:
        """Write a part of the command's standard input; stop early if the command ends."""

    def end_input(self) -> None:
        """End the command's standard input."""

    async def send_signal(self, name: str) -> None:
        """Send a signal, such as `TERM`, to all processes of the command.

        Raises:
            ConnectionLostError: The guest does not answer.
            UnsupportedError: The guest OS has no such signal.
        """

    def pause_reading(self) -> None:
        """Stop reading output, but lose none."""

    def resume_reading(self) -> None:
        """Continue to read output."""


class Transport(Protocol):
    """A way to run commands in a guest."""

    @property
    def pauses(self) -> Pauses:
        """Return whether the guest is paused."""

    def explain(self, error: Any) -> Any:
        """Add the VM's troubles to the error of a deadline, and return it."""

    def lost(self, execution: Execution) -> SmolVMError:
        """Return the error for a command that was lost: its exit code is not known."""

    def executing(
        self,
        command: Command,
        receive: Callable[[Stream, bytes], None],
        on_turn: Callable[[bool], None],
    ) -> AbstractAsyncContextManager[Execution]:
        """Run a command during the block; kill the command if it still runs at the block's end.

        A command that is `detached` goes on.

        Args:
            command: The command.
            receive: Called with all output.
            on_turn: Called when the command starts, and with false if it has to wait again.
        """


class OverTransport:
    """Base class of the controls that run commands."""

    @property
    def _shells(self) -> Sequence[str]:
        """The values of `shell=` that the guest knows."""
        return ("raw", "login")

    async def _transport(self, feature: str) -> Transport:
        """Wait until the guest is ready, and return the way to run commands in it.

        Args:
            feature: The method that needs it, for the error.
        """
        raise NotImplementedError

    def _require(self, feature: str) -> None:
        """Check that the guest supports this feature, and that the VM runs."""
        raise NotImplementedError
