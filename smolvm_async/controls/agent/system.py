"""What differs between the guests that run commands through their agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from smolvm_async.controls.commands.transport import Command


class Program(NamedTuple):
    """A program for the agent to start. The agent may log the path and the arguments."""

    path: str
    arguments: Sequence[str]
    content: bytes = b""  # the standard input


class System(Protocol):
    """A module for one guest OS: `linux` or `windows`.

    A command that is not detached has files in the guest: `out` and `err`, and `in`, its standard
    input if that is long or comes while the command runs. Then `end` is not empty after the end of
    the input.
    """

    @property
    def KEEPS_OPEN(self) -> bool:  # noqa: N802
        """Whether the agent may keep a file open that a command writes to."""

    @property
    def HAS_BELL(self) -> bool:  # noqa: N802
        """Whether a line in the file `bell` announces each part of the input, and its end."""

    @property
    def MAX_CONTENT(self) -> int:  # noqa: N802
        """Bytes of standard input that `runner()` takes; more go to the file `in`."""

    def stem(self, name: str) -> str:
        """Return the path of which `file()` makes a command's files."""

    def file(self, stem: str, name: str) -> str:
        """Return the path of one of a command's files."""

    def runner(self, command: Command, mark: str, stem: str, *, has_input: bool) -> Program:
        """Return the program that runs a command with its output in files.

        Args:
            command: The command.
            mark: A text for `signaller()` to find the command's processes by.
            stem: The path of the command's files.
            has_input: Whether the standard input is in a file, and not in `command`.
        """

    def maker(self, stem: str, mark: str, *, live: bool) -> Program:
        """Return the program that makes an empty `in`, which only its owner can read.

        If the input is `live`, it also makes `end`: the input comes while the command runs.
        """

    def signaller(self, mark: str, pid: int, name: str) -> Program:
        """Return the program that sends a signal to every process with the mark, or of the tree.

        Raises:
            UnsupportedError: The guest OS has no such signal.
        """

    def remover(self, stems: Sequence[str]) -> Program:
        """Return the program that removes the files of commands."""

    def exit_code(self, code: int, *, signal: bool) -> int:
        """Return a command's exit code. The agent has told a signal, or an exit code."""
