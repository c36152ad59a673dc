"""Is there a place for VMs: a data directory with the right rights, disk space, memory?"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import time
from pathlib import Path

from smolvm_async.doctor.findings import Verdict, failed, ok, warning
from smolvm_async.doctor.probe import scratch
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.guests import GuestProfile
from smolvm_async.host.memory import available_memory
from smolvm_async.state.directory import VMDirectory, open_directory

GIB = 1 << 30
LITTLE, TOO_LITTLE = 10 * GIB, 1 * GIB  # of disk
SAMPLE, BLOCK = "sample", bytes(1 << 20)

ELSEWHERE = "Pass the path of a directory on a local disk, which this user owns, as data_dir=."


async def check_data_dir(data_dir: Path) -> Verdict:
    """A VM's directory: made, locked, private, with a socket in it, and removed again."""
    try:
        async with scratch(data_dir) as state:
            problem = await in_thread(_problem, state.path)
            path = state.path
    except ConfigError as error:
        return failed(str(error), ELSEWHERE)
    if not problem and path.exists():
        problem = f"{path} was removed and is still there"
    if problem:
        return failed(problem, ELSEWHERE)
    return ok(f"{data_dir}: a VM's directory there is private, and its lock holds")


def _problem(path: Path) -> str:
    """What is wrong with a directory that was just made and locked; empty if nothing."""
    status = path.stat()
    if stat.S_IMODE(status.st_mode) != 0o700:
        mode = stat.S_IMODE(status.st_mode)
        return f"a directory made in {path.parent} has mode {mode:04o} instead of 0700"
    if status.st_uid != os.geteuid():
        return f"a directory made in {path.parent} belongs to user {status.st_uid}, not to us"
    again = VMDirectory(path.parent, path.name)
    if again.try_hold(create=False):
        again.release()
        return f"locks do not work in {path.parent}: one directory was locked twice"
    fd = open_directory(path)
    try:
        with socket.socket(socket.AF_UNIX) as listener:  # a path may have 107 bytes at most
            listener.bind(f"/proc/self/fd/{fd}/socket")
    except OSError as error:
        return f"no unix socket can be made in {path.parent}: {error.strerror}"
    finally:
        os.close(fd)
    return ""


async def check_disk(data_dir: Path) -> Verdict:
    """Free disk space, and a file that reaches the disk."""
    cure = "Free some space, or pass a directory on another disk as data_dir=."
    try:
        async with scratch(data_dir) as state:
            seconds = await in_thread(_write, state.path / SAMPLE)
            free = shutil.disk_usage(state.path).free
    except OSError as error:
        return failed(f"1 MiB cannot be written to {data_dir}: {error.strerror}", cure)
    found = f"{free / GIB:.1f} GiB are free in {data_dir}; 1 MiB was on disk in {seconds:.3f} s"
    if free < TOO_LITTLE:
        return failed(found, cure)
    if free < LITTLE:
        return warning(f"{found}; a guest can write as much as its disk is large", cure)
    return ok(found)


def _write(path: Path) -> float:
    started = time.monotonic()
    with path.open("wb") as file:
        file.write(BLOCK)
        file.flush()
        os.fsync(file.fileno())
    return time.monotonic() - started


async def check_memory(profile: GuestProfile) -> Verdict:
    """Free memory against what a guest takes."""
    memory = available_memory()
    found = f"{memory.available} of {memory.total} MiB are available ({memory.limit})"
    guest, default, minimum = profile.title, profile.default_memory, profile.minimum_memory
    if memory.available < minimum:
        return failed(
            f"{found}; a {guest} guest needs at least {minimum} MiB",
            "Close other programs, or raise the limit of this container or service.",
        )
    if memory.available < default:
        return warning(
            f"{found}; a {guest} guest takes {default} MiB by default",
            f"Pass memory={minimum}, or close other programs.",
        )
    return ok(f"{found}; a {guest} guest takes {default} MiB by default")
