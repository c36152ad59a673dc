"""What a command has done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Output = TypeVar("Output", str, bytes)


@dataclass(frozen=True)
class CommandResult(Generic[Output]):
    """One command that has ended.

    Attributes:
        command: As it was passed.
        exit_code: As of `subprocess`: -9 if it was killed by SIGKILL.
        stdout: What it printed, as text (what is no UTF-8 is shown as U+FFFD) or bytes.
        stderr: Likewise.
        duration: Seconds from its start to its end, as seen from here.
    """

    command: str
    exit_code: int
    stdout: Output
    stderr: Output
    duration: float

    @property
    def ok(self) -> bool:
        """Whether its exit code is 0."""
        return self.exit_code == 0


@dataclass(frozen=True)
class Line:
    """A line that a command has printed.

    Attributes:
        text: Without its end; what is no UTF-8 is shown as U+FFFD.
        stream: `stdout` or `stderr`.
    """

    text: str
    stream: str
