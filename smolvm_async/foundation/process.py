"""The only module that spawns, signals and reaps processes.

The kernel kills every child when its owner dies, even if SIGKILL ends Python: `setpriv --pdeathsig
KILL` asks for a SIGKILL when the parent dies. The parent may have died before that call, so a shell
first checks the id of its parent, and only then executes the program. The kernel sends the signal
when the *thread* that spawned the child ends, so the event loop's thread spawns all children.

The event loop watches a VM's children through pidfds. asyncio's own subprocess transport would use
a thread for each child under Python 3.11. Its `kill()` polls first, and so can take the exit status
away from that thread, which then reports 255.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from smolvm_async.errors import CommandError, LaunchError
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tail import QUOTED, LogFile, Reader
from smolvm_async.foundation.tasks import Slots, has_result, settle

logger = get_logger(__name__)

LOG_LIMIT = 256 * 1024  # bytes of output to keep for each process

# A VM's processes get only these environment variables of the owner: others may hold secrets.
LOCALE = ("LANG", "LC_ALL", "TZ")
ENVIRONMENT = ("PATH", "HOME", "TMPDIR", *LOCALE, "LD_LIBRARY_PATH", "XDG_RUNTIME_DIR")


def die_with_owner() -> list[str]:
    """Return a command prefix that makes the kernel kill the command when this process dies."""
    guard = '[ "$PPID" = "$0" ] && exec "$@"'
    return ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", guard, str(os.getpid())]


class Identity(NamedTuple):
    """The identity of a process. A process id is not enough: the kernel reuses process ids.

    Attributes:
        pid: The process id.
        started: The start time, in clock ticks since the host booted (proc(5), `starttime`).
    """

    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    started: Annotated[int, Field(ge=0, lt=1 << 63)]

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return identify(self.pid) == self

    @property
    def remains(self) -> bool:
        """True while the process has a thread: threads of a zombie may still hold its files."""
        return identify(self.pid, but="X") == self


def identify(pid: int, *, but: str = "ZX") -> Identity | None:
    """Return a process's identity; `None` if its state is in `but`, or if it does not exist.

    `but` contains letters for states, see proc(5): `Z` is a zombie, and `X` is dead.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return Identity(pid, int(fields[19])) if fields[0] not in but else None


def describe_exit(returncode: int) -> str:
    """Return a text for an exit status, such as `exit status 1` or `killed by SIGKILL`."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


class Child:
    """A child process with a log file, in a session of its own, so Ctrl-C does not reach it.

    Attributes:
        argv: The command line, without the prefix of `die_with_owner()`.
        log: The end of the child's stdout and stderr.
        exited: A future for the exit status, negative for a signal. Never cancel this future.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        process: subprocess.Popen[bytes],
        output: int,
        log: LogFile,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.log = log
        self.identity = identify(process.pid) or Identity(process.pid, 0)
        self._process = process
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        self._reader = Reader(output, log)
        self._loop.add_reader(self._pidfd, self._on_exit)

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; `None` until the process is reaped."""
        return self.exited.result() if self.exited.done() else None

    def report(self) -> str:
        """Return the name, exit status, end of the log and command, for an error message."""
        status = "is still running"
        if self.returncode is not None:
            status = f"ended: {describe_exit(self.returncode)}"
        tail = self.log.quote() or "(empty)"
        return f"{self.name} {status}.\nLog:\n{tail}\nCommand: {shlex.join(self.argv)}"

    def kill(self) -> None:
        """Send SIGKILL if the process still runs."""
        self.signal(signal.SIGKILL)

    async def reap(self) -> None:
        """Kill the process and wait until it has ended, even if cancelled. See `settle`."""
        self.kill()
        await settle(self.exited)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if the process still runs."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._reader.close()
        self.log.close()
        self.exited.set_result(self._process.wait())  # does not block: it has ended


async def spawn(
    name: str, argv: Sequence[str], *, cwd: Path, log: Path, fds: Sequence[int]
) -> Child:
    """Start `argv` in `cwd`, pass it `fds`, and keep the end of its output in the file `log`.

    Raises:
        LaunchError: If the operating system cannot start `argv` (no memory, descriptor or program).
    """
    async with _turns.of_this_loop():
        await asyncio.sleep(0)
        return _spawn(name, argv, cwd, log, fds)


# Spawn once per loop iteration: a spawn blocks for 1 to 3 ms, and many VMs may start at once.
_turns = Slots(1)


def _spawn(name: str, argv: Sequence[str], cwd: Path, log: Path, fds: Sequence[int]) -> Child:
    if logger.isEnabledFor(logging.DEBUG):  # quoting QEMU's command line takes almost 1 ms
        logger.debug("%s: %s", name, shlex.join(argv))
    with contextlib.ExitStack() as undo:
        try:
            kept = LogFile(log, LOG_LIMIT)
            undo.callback(kept.close)
            output, childs = os.pipe()
            undo.callback(os.close, output)
            with open(childs, "wb") as childs_end:
                process = subprocess.Popen(
                    [*die_with_owner(), *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=childs_end,
                    stderr=childs_end,
                    cwd=cwd,
                    env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                    pass_fds=fds,
                    umask=0o077,  # only this user may access its files
                    start_new_session=True,
                )
            undo.callback(process.wait)
            undo.callback(process.kill)
            child = Child(name, argv, process, output, kept)
        except OSError as error:
            message = f"cannot start {name}: {error}.\nCommand: {shlex.join(argv)}"
            raise LaunchError(message, command=tuple(argv)) from error
        undo.pop_all()
        return child


async def run(
    argv: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run a command on the host until it ends; return its stdout and stderr as one string.

    If the caller is cancelled, kill the command and its children. Raise a `CommandError` if the
    command cannot be started or its exit status is not 0. Add `env` to the owner's variables.
    """
    words = [str(word) for word in argv]
    logger.debug("%s", shlex.join(words))
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *die_with_owner(),
            *words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd or "/",  # this process's own directory may have been deleted
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    )
    try:
        process = await settle(starting)
        output, _ = await process.communicate()
    except OSError as error:
        message = f"cannot start {shlex.join(words)}: {error}"
        raise CommandError(message, command=tuple(words)) from error
    except asyncio.CancelledError:
        if has_result(starting):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(starting.result().pid, signal.SIGKILL)
            await settle(starting.result().wait())
        raise
    text = output.decode(errors="replace")
    if process.returncode:
        status = describe_exit(process.returncode)
        raise CommandError(
            f"{shlex.join(words)}: {status}\n{text[-QUOTED:].strip()}",
            command=tuple(words),
            returncode=process.returncode,
            output=text,
        )
    return text
