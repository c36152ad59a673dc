"""The only place that spawns, signals and reaps processes.

Every child dies with its owner: `setpriv --pdeathsig KILL` sets the parent-death signal, a shell
looks whether the owner still lives (it may have died before the signal was set) and then becomes
the program, so that even a SIGKILL of Python leaves nothing running. The signal follows the
*thread* that spawned the child, which is the event loop's.

A VM's children are watched by the event loop through a pidfd. asyncio's own subprocess transport
would take a thread for each under Python 3.11, and its `kill()` polls first and so can take the
exit status away from that thread, which then reports 255.
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

LOG_LIMIT = 256 * 1024  # bytes of its output that are kept for each process

# What a VM's process gets of the owner's environment: the rest may hold secrets.
ENVIRONMENT = (
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "LC_ALL",
    "TZ",
    "LD_LIBRARY_PATH",
    "XDG_RUNTIME_DIR",
)


def die_with_owner() -> list[str]:
    """What stands before a command line, so that the process dies with this one."""
    guard = '[ "$PPID" = "$0" ] && exec "$@"'
    return ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", guard, str(os.getpid())]


class Identity(NamedTuple):
    """Which process: a process id alone is given again to others.

    Attributes:
        pid: The process id.
        started: When it started, in clock ticks since the host booted (proc(5), `starttime`).
    """

    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    started: Annotated[int, Field(ge=0, lt=1 << 63)]

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return identify(self.pid) == self

    @property
    def remains(self) -> bool:
        """Whether there is anything of it: a zombie's other threads may have its files yet."""
        return _identify(self.pid, but="X") == self


def identify(pid: int) -> Identity | None:
    """The identity of a process that runs now; `None` if there is none, or only a zombie."""
    return _identify(pid, but="ZX")


def _identify(pid: int, but: str) -> Identity | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return Identity(pid, int(fields[19])) if fields[0] not in but else None


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
        argv: Its command line, without `die_with_owner()` in front.
        log: What it writes to stdout and stderr.
        identity: Which process it is.
        exited: A future of its exit status, negative for a signal; never cancelled.
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
        """Its exit status once reaped, negative for a signal; `None` while it runs."""
        return self.exited.result() if self.exited.done() else None

    def report(self) -> str:
        """Name, exit status, the end of the log and the command, for an error message."""
        status = "still runs"
        if self.returncode is not None:
            status = f"ended: {describe_exit(self.returncode)}"
        tail = self.log.quote() or "(empty)"
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
        self._reader.close()
        self.log.close()
        self.exited.set_result(self._process.wait())  # it has ended: this only reaps


async def spawn(
    name: str, argv: Sequence[str], *, cwd: Path, log: Path, fds: Sequence[int]
) -> Child:
    """Start `argv` in `cwd`, with `fds` inherited and the end of its output in the file `log`.

    Raises:
        LaunchError: If the operating system refuses (no memory, no descriptors, no program).
    """
    async with _turns.of_this_loop():
        await asyncio.sleep(0)
        return _spawn(name, argv, cwd, log, fds)


# One spawn for each turn of the loop: it blocks for 1 to 3 ms, and many VMs may start.
_turns = Slots(1)


def _spawn(name: str, argv: Sequence[str], cwd: Path, log: Path, fds: Sequence[int]) -> Child:
    if logger.isEnabledFor(logging.DEBUG):  # QEMU's command line takes most of a millisecond
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
                    umask=0o077,  # what it makes is for this user alone
                    start_new_session=True,
                )
            undo.callback(process.wait)
            undo.callback(process.kill)
            child = Child(name, argv, process, output, kept)
        except OSError as error:
            message = f"{name} could not be started: {error}.\nCommand: {shlex.join(argv)}"
            raise LaunchError(message) from error
        undo.pop_all()
        return child


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
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *die_with_owner(),
            *words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    )
    try:
        process = await settle(starting)
        output, _ = await process.communicate()
    except OSError as error:
        raise CommandError(f"{shlex.join(words)} could not be started: {error}") from error
    except asyncio.CancelledError:
        if has_result(starting):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(starting.result().pid, signal.SIGKILL)
            await settle(starting.result().wait())
        raise
    text = output.decode(errors="replace")
    if process.returncode:
        status = describe_exit(process.returncode)
        raise CommandError(f"{shlex.join(words)}: {status}\n{text[-QUOTED:].strip()}")
    return text
