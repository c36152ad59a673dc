"""The result of a command, and a line of its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import AnyStr, Generic


@dataclass(frozen=True)
class CommandResult(Generic[AnyStr]):
    """The result of a command that has ended.

    Attributes:
        command: The command as it was passed.
        exit_code: The exit code as in `subprocess`: -9 if SIGKILL has killed the command.
        stdout: The output, as text (invalid UTF-8 becomes U+FFFD) or as bytes.
        stderr: The error output, in the same form.
        duration: Seconds from the command's start to its end, as seen from this process.
    """

    command: str
    exit_code: int
    stdout: AnyStr
    stderr: AnyStr
    duration: float

    @property
    def ok(self) -> bool:
        """Return whether the exit code is 0."""
        return self.exit_code == 0


@dataclass(frozen=True)
class Line:
    """A line of a command's output.

    Attributes:
        text: The line without its newline; invalid UTF-8 becomes U+FFFD.
        stream: `stdout` or `stderr`.
    """

    text: str
    stream: str
