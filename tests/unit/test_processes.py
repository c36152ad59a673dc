"""Child processes: lost exit statuses, cancelled commands, refused pidfds, and forked children."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from smolvm_async import HostError, SmolVMError
from smolvm_async.errors import CommandError
from smolvm_async.foundation import process
from smolvm_async.foundation.fork import close_private, private, this_process
from smolvm_async.foundation.locking import LockFile, is_locked, try_lock
from smolvm_async.foundation.tasks import in_thread, settle

DEADLINE = 20  # seconds until a forked child that hangs is killed

# Lose exit statuses in one of these ways, then run commands and a child.
THIEVES = """
import asyncio, json, os, signal, sys, tempfile, threading, time
from pathlib import Path
from smolvm_async.errors import CommandError
from smolvm_async.foundation.process import run, spawn

def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass

def reap_always():
    while True:
        reap()
        time.sleep(0.0001)

if sys.argv[1] == "thread":
    threading.Thread(target=reap_always, daemon=True).start()
else:
    signal.signal(signal.SIGCHLD, {"ignored": signal.SIG_IGN, "handler": reap}[sys.argv[1]])

async def status(*command):
    try:
        return 0, await run(command)
    except CommandError as error:
        return error.returncode, error.output

async def main(work):
    told = [
        await status("echo", "done"),
        await status("sh", "-c", "echo no; exit 3"),
        await status("sh", "-c", "kill -KILL $$"),
        # A program that waits for its own children needs a SIGCHLD that is not ignored.
        await status(sys.executable, "-c", "import os; os._exit(os.system('exit 5') >> 8)"),
        await status("no-such-program"),
    ]
    child = await spawn("child", ["sh", "-c", "echo out; exit 4"], cwd=work, log=work / "l", fds=[])
    await asyncio.wait([child.exited])
    print(json.dumps([told, child.ended, child.returncode, child.report(), child.log.text()]))

with tempfile.TemporaryDirectory() as work:
    asyncio.run(main(Path(work)))
"""


@pytest.mark.parametrize(
    ("thief", "named"),
    [
        ("ignored", "this process ignores SIGCHLD"),
        ("handler", "handler of SIGCHLD, reap,"),
        ("thread", "a thread that calls os.waitpid(-1)"),
    ],
)
def test_a_lost_exit_status_is_reported_by_the_shell_or_is_unknown(thief: str, named: str) -> None:
    command = [sys.executable, "-c", THIEVES, thief]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told, ended, status, report, log = json.loads(done.stdout)
    assert told[0] == [0, "done\n"]
    assert told[1] == [3, "no\n"]
    assert [status for status, _ in told[2:]] == [-9, 5, 127]
    assert (ended, log) == (True, "out\n")
    if thief == "thread" and status is not None:  # the thread was too slow
        assert status == 4
        return
    assert status is None
    assert "exit status unknown" in report
    assert named in report


@pytest.mark.anyio
async def test_a_cancelled_command_ends_with_its_children_before_the_call(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 600 & echo $! $$ >{pids}.new; mv {pids}.new {pids}; wait"
    task = asyncio.create_task(process.run(["sh", "-c", script]))
    while not pids.exists():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):  # a process that was killed lives until its next turn
        while [pid for pid in pids.read_text().split() if process.identify(int(pid))]:
            await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_a_command_inherits_descriptors_and_has_no_input() -> None:
    fds = [os.memfd_create(name) for name in ("one", "two")]
    try:
        for fd in fds:
            os.write(fd, f"{fd}\n".encode())
        files = [f"/proc/self/fd/{fd}" for fd in fds]
        assert await process.run(["cat", *files, "-"], fds=fds) == "".join(f"{fd}\n" for fd in fds)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.anyio
async def test_refused_pidfds_are_an_error_with_the_cure_before_a_command_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(HostError, match="seccomp profile") as raised:
        await process.run(["touch", tmp_path / "touched"])
    assert raised.value.missing == ("pidfd",)
    assert not list(tmp_path.iterdir())


@pytest.mark.anyio
@pytest.mark.parametrize("refused", ["pidfd_send_signal", "waitid"])
async def test_a_child_is_killed_and_reaped_without_newer_system_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: str
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(signal if "signal" in refused else os, refused, refuse)
    log = tmp_path / "log"
    child = await process.spawn("sleep", ["sleep", "600"], cwd=tmp_path, log=log, fds=[])
    await child.reap()
    assert child.returncode == -9


# A forked child of the test process must not return to pytest: it tells its result by its status.


def in_child(work: object) -> int:
    """Call `work` in a forked child, and return the child's exit status: 0 if it returns true."""
    pid = os.fork()
    if not pid:
        signal.alarm(DEADLINE)
        status = 1
        try:
            status = 0 if work() else 2  # type: ignore[operator]
        except SystemExit as leaving:
            status = int(str(leaving.code))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_does_not_keep_locks_of_its_parent(tmp_path: Path) -> None:
    lock = LockFile(tmp_path / "lock")
    assert lock.try_lock()
    directory = os.open(tmp_path, os.O_RDONLY)
    assert try_lock(directory)
    ours, childs = socket.socketpair()
    child = os.fork()
    if not child:
        childs.send(b"!")
        ours.close()
        childs.recv(1)  # until the parent has released its locks, and longer
        os._exit(0)
    try:
        ours.recv(1)
        lock.unlock()
        os.close(directory)
        directory = os.open(tmp_path, os.O_RDONLY)
        assert not is_locked(directory)
        assert lock.try_lock()
        lock.unlock()
    finally:
        for end in (ours, childs):
            end.close()
        os.close(directory)
        os.waitpid(child, 0)


def test_a_forked_child_replaces_private_descriptors_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    kept = os.open(path, os.O_RDONLY)
    late = private(os.open(path, os.O_RDONLY))
    close_private(late)
    reused = os.open(path, os.O_RDONLY)
    ours = private(os.open(path, os.O_RDONLY))
    try:
        assert reused == late
        expected = {kept: b"content", reused: b"content", ours: b""}
        assert in_child(lambda: {fd: os.pread(fd, 9, 0) for fd in expected} == expected) == 0
        assert os.pread(ours, 9, 0) == b"content"
    finally:
        for fd in (kept, reused, ours):
            os.close(fd)


@pytest.mark.anyio
async def test_the_end_of_a_loop_in_a_forked_child_does_not_deafen_its_parent() -> None:
    loop = asyncio.get_running_loop()
    await in_thread(int)  # the library uses this loop
    here, there = os.pipe()
    seen = asyncio.Event()
    loop.add_reader(here, seen.set)

    def close() -> bool:
        loop._selector.unregister(here)  # type: ignore[attr-defined]
        loop._close_self_pipe()  # type: ignore[attr-defined]
        return True

    try:
        assert in_child(close) == 0
        async with asyncio.timeout(60):
            os.write(there, b"!")
            await seen.wait()
            assert await in_thread(int) == 0  # the thread wakes the loop
    finally:
        loop.remove_reader(here)
        os.close(here)
        os.close(there)


@pytest.mark.anyio
async def test_a_coroutine_of_the_parent_ends_in_a_forked_child(tmp_path: Path) -> None:
    await in_thread(int)
    started = tmp_path / "started"

    def end(error: type[BaseException], work: object) -> bool:
        coroutine = settle(in_thread(started.touch))
        try:
            coroutine.send(None)
        except error as raised:
            return work is None or raised is work
        return False

    def interrupted() -> bool:
        leaving = SystemExit(3)
        try:
            raise leaving
        except SystemExit:
            return end(SystemExit, leaving)

    owner = this_process()
    assert in_child(lambda: not owner.is_this) == 0
    assert in_child(lambda: end(SmolVMError, None)) == 0
    assert in_child(interrupted) == 0
    assert in_child(lambda: asyncio.run(in_thread(lambda: 1)) == 1) == 0  # its own loop works
    assert not started.exists()


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent() -> None:
    async def main() -> bool:
        over = threading.Event()
        waiting = asyncio.create_task(in_thread(over.wait))
        await asyncio.sleep(0)  # it begins
        if not (pid := os.fork()):
            signal.alarm(DEADLINE)
            sys.exit(3)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        over.set()
        return await waiting and status == 3

    assert in_child(lambda: asyncio.run(main())) == 0


def test_a_fork_in_a_thread_leaves_the_loop_to_the_parent(tmp_path: Path) -> None:
    async def main() -> int:
        await in_thread(int)
        statuses: list[int] = []
        thread = threading.Thread(
            target=lambda: statuses.append(in_child(lambda: asyncio.run(in_thread(os.getpid)) > 0))
        )
        thread.start()
        while thread.is_alive():
            await in_thread(time.sleep, 0.001)
        return statuses[0]

    assert asyncio.run(main()) == 0


@pytest.mark.anyio
async def test_a_command_that_cannot_start_is_told() -> None:
    with pytest.raises(CommandError, match="cannot start true"):
        await process.run(["true"], cwd=Path("/nowhere"))
