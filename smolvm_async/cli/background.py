"""`run -d`: a process of its own owns the VM, and goes on after the terminal has closed."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

from smolvm_async.foundation.process import LOG_LIMIT, continue_in_background
from smolvm_async.foundation.tail import LogFile

STDOUT, STDERR = 1, 2


class Background:
    """The background process. Making an object makes the process, and continues there.

    Until `leave_terminal()`, the process writes to the terminal of the command, which waits. In
    text output, the only line on the command's stdout is the VM's id, so all else goes to stderr.
    """

    def __init__(self, *, json: bool) -> None:
        self._waiting = continue_in_background()
        self._stdout = os.dup(STDOUT)
        if not json:
            os.dup2(STDERR, STDOUT)

    def restore_stdout(self) -> None:
        """Write to the command's stdout again."""
        os.dup2(self._stdout, STDOUT)
        os.close(self._stdout)

    def leave_terminal(self, log: Path) -> None:
        """End the command with success, and write to a log from now on.

        Raises:
            BrokenPipeError: The command was killed, so nobody knows of the VM.
        """
        os.write(self._waiting, b"1")
        os.close(self._waiting)
        with open(os.devnull, "r+b", buffering=0) as nowhere:
            for fd in (STDOUT, STDERR):
                os.dup2(nowhere.fileno(), fd)
        text: Any = io.TextIOWrapper(_Log(log), errors="backslashreplace", write_through=True)
        sys.stdout = sys.stderr = text
        for handler in logging.root.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(text)


class _Log(io.RawIOBase):
    """A log file of a bounded size, since a guest may cause any number of events."""

    def __init__(self, path: Path) -> None:
        self._file = LogFile(path, LOG_LIMIT)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.feed(bytes(data))
        return len(data)
