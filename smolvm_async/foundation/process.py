"""The only module that spawns, signals and reaps processes.

The kernel kills every child when its owner dies, even if SIGKILL ends Python: `setpriv --pdeathsig
KILL` asks for a SIGKILL when the parent dies. The parent may have died before that call, so a shell
first checks the id of its parent, and only then executes the program. The kernel sends the signal
when the *thread* that spawned the child ends. So a `Spawner`, a thread that lasts as long as a VM,
spawns the processes of the VM, and the event loop may move to another thread. The event loop's
thread spawns all other children.

The event loop watches all children through pidfds. asyncio's own child watchers differ between
versions of Python, and report the status 255 if they lose an exit status.

A process can lose exit statuses: it may ignore SIGCHLD (as its parent did), or another thread or a
signal handler may wait for all children. A pidfd shows the end of its process even then, and the
exit status is `None`, "unknown". `run` never loses the status of its command: a shell reports it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar

from pydantic import Field

from smolvm_async.errors import CommandError, HostError, LaunchError
from smolvm_async.foundation.fork import this_process
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tail import QUOTED, LogFile, Reader, Tail
from smolvm_async.foundation.tasks import Slots, no_thread, settle

logger = get_logger(__name__)

T = TypeVar("T")

LOG_LIMIT = 256 * 1024  # bytes of output to keep for each process
KILLED = 5.0  # seconds for the end of a command's own children after SIGKILL

# errno of a kernel that is too old, or of a seccomp profile that refuses a system call
REFUSED = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL)

# A VM's processes get only these environment variables of the owner: others may hold secrets.
LOCALE = ("LANG", "LC_ALL", "TZ")
ENVIRONMENT = ("PATH", "HOME", "TMPDIR", *LOCALE, "LD_LIBRARY_PATH", "XDG_RUNTIME_DIR")


DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c"]
EXECUTE = '[ "$PPID" = "$0" ] && exec "$@"'


def _reporting(fds: Sequence[int]) -> str:
    """Return a script that runs a command, and writes its exit status to the shell's stdin.

    The command dies with the shell. It has no stdin. It and its children keep a copy of the shell's
    stdin as another descriptor, so the end of file shows that they have ended.
    """
    free = next(fd for fd in range(9, 2, -1) if fd not in fds)  # the shell knows only digits
    guarded = shlex.join([*DIE_WITH_PARENT, EXECUTE])
    return f"""[ "$PPID" = "$0" ] || exit
{guarded} "$$" "$@" {free}>&0 </dev/null
echo "$?" >&0"""


def die_with_owner(script: str = EXECUTE) -> list[str]:
    """Return a command prefix that makes the kernel kill the command when this process dies."""
    return [*DIE_WITH_PARENT, script, str(os.getpid())]


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
            fields = stat_fields(file.read())
    except OSError:
        return None
    return Identity(pid, int(fields[19])) if fields[0] not in but else None


def stat_fields(text: str) -> list[str]:
    """Return the fields of a `/proc/PID/stat` after the name, see proc(5): the state comes first.

    The name may contain spaces and parentheses.
    """
    return text.rpartition(")")[2].split()


def own_identity() -> Identity:
    """Return the identity of this process, even if /proc shows another PID namespace."""
    with open("/proc/self/stat") as file:
        return Identity(os.getpid(), int(stat_fields(file.read())[19]))


def describe_exit(returncode: int | None) -> str:
    """Return a text for an exit status, such as `exit status 1` or `killed by SIGKILL`."""
    if returncode is None:
        return f"exit status unknown ({_status_taker()})"
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def _status_taker() -> str:
    """Return a text for what takes the exit statuses of this process's children."""
    handler = signal.getsignal(signal.SIGCHLD)
    if handler is signal.SIG_IGN:
        return "this process ignores SIGCHLD, so the kernel drops exit statuses"
    if handler is signal.SIG_DFL:
        return "another part of this process took it, such as a thread that calls os.waitpid(-1)"
    name = getattr(handler, "__qualname__", "of another language")
    return f"this process's handler of SIGCHLD, {name}, took it"


def open_pidfd(pid: int) -> int:
    """Return a pidfd for a process; raise `ProcessLookupError` if the process does not exist.

    Raises:
        HostError: If the host refuses pidfds.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise HostError(
            f"This host refuses pidfd_open(2): {error.strerror}.",
            hint="Use Linux 5.3 or newer; in a container, use a seccomp profile that allows "
            "pidfd_open, such as the current one of Docker or Podman.",
            missing=("pidfd",),
        ) from error


def check_pidfds() -> None:
    """Raise a `HostError` if the host refuses pidfds."""
    os.close(open_pidfd(os.getpid()))


def send_signal(pidfd: int, identity: Identity, number: signal.Signals) -> None:
    """Send a signal to a process if it still runs.

    Without pidfd_send_signal(2), use the process id, after a check of the start time.
    """
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        if identity.remains:
            with contextlib.suppress(ProcessLookupError):
                os.kill(identity.pid, number)


class Child:
    """A child process with a log, in a session of its own, so Ctrl-C does not reach it.

    Attributes:
        argv: The command line, without the prefix of `die_with_owner()`.
        log: The end of the child's stdout and stderr.
        exited: A future for the exit status, negative for a signal, `None` if unknown. Never cancel
            this future.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        process: subprocess.Popen[bytes],
        output: int,
        log: Tail,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.log = log
        self.identity = identify(process.pid) or Identity(process.pid, 0)
        self._process = process
        self._owner = this_process()
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        self._pidfd: int | None = None  # for a child that has ended, and whose status is lost
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = open_pidfd(process.pid)
        self._reader = Reader(output, log)
        if self._pidfd is None:
            self._loop.call_soon(self._on_exit)
        else:
            self._loop.add_reader(self._pidfd, self._on_exit)

    @property
    def ended(self) -> bool:
        """True once the process has ended."""
        return self.exited.done()

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; `None` if unknown, or until the process ends."""
        return self.exited.result() if self.ended else None

    def report(self) -> str:
        """Return the name, exit status, end of the log and command, for an error message."""
        status = "is still running"
        if self.ended:
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

    def said(self, text: str) -> bool:
        """Return whether the child has already written this text."""
        self._reader.drain()
        return text in self.log.text()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if the process still runs; do nothing in a forked child."""
        if self._pidfd is not None and self._owner.is_this:
            send_signal(self._pidfd, self.identity, number)

    def _on_exit(self) -> None:
        status = None
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            status = self._take_status(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        self._process.returncode = status or 0  # or Popen would wait for this process id later
        self._reader.close()
        self.log.close()
        self.exited.set_result(status)

    def _take_status(self, pidfd: int) -> int | None:
        """Reap the process, which has ended, and return its exit status; `None` if it is lost."""
        try:
            with contextlib.suppress(PermissionError):  # by a seccomp profile
                ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
                if ended is None:
                    return None
                status = ended.si_status
                return status if ended.si_code == os.CLD_EXITED else -status
            _, status = os.waitpid(self.identity.pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(status)
        except OSError:
            return None


class Spawner:
    """A thread that spawns the processes of one VM, and lasts as long as the VM.

    The thread's children inherit the seccomp filter that it puts on itself. The kernel kills them
    when the thread ends: after `close()`, once the spawner is forgotten, or with this process.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started = False
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def run(self, function: Callable[[], T]) -> T:
        """Run a short `function` in the thread, and wait for its end.

        This blocks the calling thread, as a spawn in that thread would. Beside a busy event loop,
        two changes between threads without blocking would take up to 10 ms. This process does not
        fork meanwhile.

        Raises:
            HostError: If the host cannot start a thread.
        """
        if not self._started:
            name, jobs = "smolvm-spawner", (self._jobs,)
            try:
                threading.Thread(target=_do, name=name, args=jobs, daemon=True).start()
            except RuntimeError as error:
                raise no_thread(error) from error
            self._started = True
        future: Future[T] = Future()
        self._jobs.put(partial(_fulfil, future, function))
        return future.result()

    def close(self) -> None:
        """End the thread. Its processes have ended before, or the kernel kills them."""
        self._jobs.put(None)


def _do(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job


def _fulfil(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(_without_fork(function))
    except BaseException as error:
        future.set_exception(error)


def continue_in_background() -> int:
    """Continue in a child process that has a session of its own; this process waits, and exits.

    The child, in which this function returns, gets no terminal's signals. It returns a descriptor:
    when the child writes there, this process exits with status 0. If the child ends first, this
    process exits with its status. Until then, this process passes signals on to the child.

    Call this function before the first event loop and the first thread.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        _wait_for_background(child, reading)
    os.close(reading)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with open(os.devnull) as nowhere:
        os.dup2(nowhere.fileno(), 0)
    for name in os.listdir("/proc/self/fd"):  # such as the lock of a shell script
        with contextlib.suppress(OSError):
            if int(name) > 2 and os.get_inheritable(int(name)):
                os.close(int(name))
    return writing


def _wait_for_background(child: int, reading: int) -> NoReturn:
    def pass_on(number: int, _: object) -> None:
        os.kill(child, signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    if os.read(reading, 1):
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


async def spawn(
    name: str,
    argv: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    fds: Sequence[int],
    spawner: Spawner | None = None,
) -> Child:
    """Start `argv` in `cwd`, pass it `fds`, and keep the end of its output in the file `log`.

    The kernel kills the process when the thread of `spawner`, or else this thread, ends.

    Raises:
        LaunchError: If the operating system cannot start `argv` (no memory, descriptor or program).
    """
    async with _turns.of_this_loop():
        await asyncio.sleep(0)
        return _spawn(name, argv, cwd, log, fds, spawner)


# Popen waits until all copies of its pipe are closed. If another thread forks meanwhile, the child
# has a copy, and Popen would block its thread until that child ends. So fork() waits for Popen.
_spawning = threading.RLock()  # reentrant: a signal handler may fork
os.register_at_fork(
    before=_spawning.acquire,
    after_in_parent=_spawning.release,
    after_in_child=_spawning.release,
)


def _without_fork(function: Callable[[], T]) -> T:
    with _spawning:
        return function()


# Spawn once per loop iteration: a spawn blocks for 1 to 3 ms, and many VMs may start at once.
_turns = Slots(1)


def _spawn(
    name: str,
    argv: Sequence[str],
    cwd: Path,
    log: Path,
    fds: Sequence[int],
    spawner: Spawner | None,
) -> Child:
    if logger.isEnabledFor(logging.DEBUG):  # quoting QEMU's command line takes almost 1 ms
        logger.debug("%s: %s", name, shlex.join(argv))
    with contextlib.ExitStack() as undo:
        try:
            kept = LogFile(log, LOG_LIMIT)
            undo.callback(kept.close)
            child = _start(
                name,
                argv,
                kept,
                spawner=spawner,
                cwd=cwd,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                pass_fds=fds,
                umask=0o077,  # only this user may access its files
            )
        except OSError as error:
            message = f"cannot start {name}: {error}.\nCommand: {shlex.join(argv)}"
            raise LaunchError(message, command=tuple(argv)) from error
        undo.pop_all()
        return child


def _start(
    name: str,
    argv: Sequence[str],
    log: Tail,
    *,
    spawner: Spawner | None = None,
    script: str = EXECUTE,
    stdin: int = subprocess.DEVNULL,
    **options: Any,
) -> Child:
    with contextlib.ExitStack() as undo:
        output, childs = os.pipe()
        undo.callback(os.close, output)
        with open(childs, "wb") as end:
            words = [*die_with_owner(script), *argv]
            start = partial(_popen, words, stdin=stdin, stdout=end, stderr=end, **options)
            process = _without_fork(start) if spawner is None else spawner.run(start)
        undo.callback(process.wait)
        undo.callback(process.kill)
        child = Child(name, argv, process, output, log)
        undo.pop_all()
        return child


def _popen(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, start_new_session=True, **options)


def exit_code(argv: Sequence[str]) -> int | None:
    """Run a program that ends at once, and return its exit code; `None` if it cannot start.

    This blocks, some 20 ms for a small Python program.
    """
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        return _without_fork(partial(_popen, argv, **silent)).wait()
    except OSError:
        return None


async def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    fds: Sequence[int] = (),
) -> str:
    """Run a command on the host until it ends; return its stdout and stderr as one string.

    If the caller is cancelled, kill the command and its children. Raise a `CommandError` if the
    command cannot be started or its exit status is not 0. Add `env` to the owner's variables, and
    pass the descriptors `fds`.
    """
    words = [str(word) for word in argv]
    logger.debug("%s", shlex.join(words))
    check_pidfds()
    output, reported = Tail(sys.maxsize), Tail(QUOTED)
    async with _turns.of_this_loop():
        await asyncio.sleep(0)
        variables = {**os.environ, **(env or {})}
        try:
            child, report = _start_shell(
                words, output, reported, cwd=cwd or "/", env=variables, pass_fds=fds
            )
        except OSError as error:
            message = f"cannot start {shlex.join(words)}: {error}"
            raise CommandError(message, command=tuple(words)) from error
    try:
        await asyncio.wait([child.exited])
    finally:
        if not child.ended:
            await settle(_end_group(child, report))
        report.close()
    status = _reported_status(reported.text(), child)
    if status != 0:
        text = output.text()
        raise CommandError(
            f"{shlex.join(words)}: {describe_exit(status)}\n{text[-QUOTED:].strip()}",
            command=tuple(words),
            returncode=status,
            output=text,
        )
    return output.text()


def _start_shell(
    words: Sequence[str], output: Tail, reported: Tail, *, pass_fds: Sequence[int], **options: Any
) -> tuple[Child, Reader]:
    """Start a shell that runs a command; return the shell, and the reader of its report."""
    ours, shells = os.pipe()
    report = Reader(ours, reported)
    try:
        with open(shells, "wb") as stdin:
            script = _reporting(pass_fds)
            options |= {"script": script, "stdin": stdin.fileno(), "pass_fds": pass_fds}
            return _start(words[0], words, output, **options), report
    except BaseException:
        report.close()
        raise


async def _end_group(child: Child, report: Reader) -> None:
    """Kill a command, its shell and its children, and wait until they have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.identity.pid, signal.SIGKILL)
    await asyncio.wait([child.exited])
    await asyncio.wait([report.ended], timeout=KILLED)  # a child in another session may live on


def _reported_status(text: str, child: Child) -> int | None:
    """Return the status that the shell reported, negative for a signal, or else its own status."""
    if not text.strip().isdigit():
        return child.returncode or None
    status = int(text)
    return 128 - status if status - 128 in set(signal.Signals) else status
