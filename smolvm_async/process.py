"""The only place that spawns, signals and reaps processes.

Every child dies with its owner: `setpriv --pdeathsig KILL` sets the parent-death signal and
then becomes the program, so that even a SIGKILL of Python leaves nothing running. The signal
follows the *thread* that spawned the child, which is the event loop's.

A VM's children are watched by the event loop through a pidfd. asyncio's own subprocess transport
would take a thread for each under Python 3.11, and its `kill()` polls first and so can take the
exit status away from that thread, which then reports 255.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from smolvm_async.errors import CommandError, LaunchError
from smolvm_async.shielding import settle

logger = logging.getLogger(__name__)

DIE_WITH_OWNER = ("setpriv", "--pdeathsig", "KILL", "--")
LOG_TAIL = 4096  # bytes of a log that an error quotes


CONTROL = r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b.?|[^\n\t\x20-\x7e\xa0-\U0010ffff]"


def printable(text: str) -> str:
    """`text` without terminal control sequences: a guest may have chosen it."""
    return re.sub(CONTROL, "", text)


def log_tail(path: Path, limit: int = LOG_TAIL) -> str:
    """The last `limit` bytes of a log file, as text; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
            return printable(file.read().decode(errors="replace")).strip()
    except OSError:
        return ""


def describe_exit(returncode: int) -> str:
    """`exit status 1`, or `killed by SIGKILL`."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


class Child:
    """A running child process: in a session of its own (no Ctrl-C reaches it), logging to a file.

    Attributes:
        name: What messages call it, such as `QEMU`.
        argv: Its command line, without the `setpriv` in front.
        log: The file that takes its stdout and stderr.
        pid: Its process id.
        exited: A future of its exit status, negative for a signal; never cancelled.
    """

    def __init__(
        self, name: str, argv: Sequence[str], log: Path, process: subprocess.Popen[bytes]
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.log = log
        self.pid = process.pid
        self._process = process
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)

    @property
    def returncode(self) -> int | None:
        """Its exit status once reaped, negative for a signal; `None` while it runs."""
        return self.exited.result() if self.exited.done() else None

    def report(self) -> str:
        """Name, exit status, the end of the log and the command, for an error message."""
        status = "still runs"
        if self.returncode is not None:
            status = f"ended: {describe_exit(self.returncode)}"
        tail = log_tail(self.log) or "(empty)"
        return f"{self.name} {status}.\nLog:\n{tail}\nCommand: {shlex.join(self.argv)}"

    def terminate(self) -> None:
        """Send SIGTERM, if it still runs."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        self._signal(signal.SIGKILL)

    async def reap(self) -> None:
        """Kill it and wait until it is gone; cancellation is held back until then."""
        self.kill()
        await settle(self.exited)

    def _signal(self, number: signal.Signals) -> None:
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exited.set_result(self._process.wait())  # it has ended: this only reaps


async def spawn(
    name: str, argv: Sequence[str], *, cwd: Path, log: Path, fds: Sequence[int]
) -> Child:
    """Start `argv` in `cwd`, with `fds` inherited and its output appended to `log`.

    Raises:
        LaunchError: If the operating system refuses (no memory, no descriptors, no program).
    """
    async with _turn():
        await asyncio.sleep(0)
        return _spawn(name, argv, cwd, log, fds)


_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = (
    weakref.WeakKeyDictionary()
)


def _turn() -> asyncio.Lock:
    """One spawn for each turn of the loop: it blocks for 1 to 3 ms, and many VMs may start."""
    return _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())


def _spawn(name: str, argv: Sequence[str], cwd: Path, log: Path, fds: Sequence[int]) -> Child:
    logger.debug("%s: %s", name, shlex.join(argv))
    process = None
    try:
        with open(log, "ab", opener=_private) as output:
            process = subprocess.Popen(
                [*DIE_WITH_OWNER, *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                pass_fds=fds,
                start_new_session=True,
            )
        return Child(name, argv, log, process)
    except OSError as error:
        if process is not None:
            process.kill()
            process.wait()
        message = f"{name} could not be started: {error}.\nCommand: {shlex.join(argv)}"
        raise LaunchError(message) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


async def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a host command to its end and return what it printed (stdout and stderr together).

    Args:
        argv: The command and its arguments.
        cwd: Its working directory.
        env: Variables added to this process's own.

    Raises:
        CommandError: If it cannot be started, or ends with another status than 0.
    """
    words = [str(word) for word in argv]
    logger.debug("%s", shlex.join(words))
    try:
        process = await asyncio.create_subprocess_exec(
            *DIE_WITH_OWNER,
            *words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    except OSError as error:
        raise CommandError(f"{shlex.join(words)} could not be started: {error}") from error
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await settle(process.wait())
        raise
    text = output.decode(errors="replace")
    if process.returncode:
        status = describe_exit(process.returncode)
        raise CommandError(f"{shlex.join(words)}: {status}\n{text[-LOG_TAIL:].strip()}")
    return text
