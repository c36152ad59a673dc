"""Starts actors (see `tests.faults.actors`), and hears their words."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.faults.injection import PROGRAMS

LONG = 30.0  # seconds that nothing here takes


class Stage:
    """A process that forks actors on demand."""

    def __init__(self, data_dir: Path) -> None:
        command = [sys.executable, "-m", "tests.faults.actors"]
        root = Path(__file__).parents[2]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=root, bufsize=0)
        self._data_dir = data_dir
        self._rest = b""
        self._said: list[tuple[int, str]] = []

    def call(self, name: str, *arguments: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments], default=str).encode() + b"\n")

    def hear(self, *words: str, pid: int = 0) -> tuple[int, str]:
        """Wait until an actor says one of these words, and return its process id and the word."""
        deadline = time.monotonic() + LONG
        while True:
            for said in self._said:
                if said[1] in words and pid in (0, said[0]):
                    self._said.remove(said)
                    return said
            told = self._listen(deadline - time.monotonic())
            assert told, f"no actor says {words}, but {self._said}"

    def has_said(self, word: str, pid: int) -> bool:
        """Return whether an actor that is dead had said the word."""
        while self._listen(0):
            pass
        return (pid, word) in self._said

    def _listen(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], max(0.0, seconds))[0]:
            return b""
        said = os.read(self._process.stdout.fileno(), 65536)
        *lines, self._rest = (self._rest + said).split(b"\n")
        for pid, word in (line.decode().split() for line in lines):
            self._said.append((int(pid), word))
        return said

    def close(self) -> None:
        """End the process, and all processes that a failed test has left."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pid = self._process.pid
        actors = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for left in [*map(int, actors), *inhabitants(self._data_dir).values()]:
            kill(left)
        self._process.stdin.close()
        self._process.wait(LONG)
        self._process.stdout.close()


def inhabitants(data_dir: Path) -> dict[str, int]:
    """The processes that work in a VM's directory, by their program's name."""
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if os.readlink(process / "cwd").startswith(f"{data_dir}/"):
                    names = {Path(word).name for word in words} & {*PROGRAMS}
                    found[min(names, default=words[0])] = int(process.name)
    return found


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
