"""The logs of a VM's processes, readable in any state of the VM."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from smolvm_async.config.checks import check_vm_id
from smolvm_async.config.options import make_data_dir
from smolvm_async.errors import SmolVMError
from smolvm_async.foundation.locking import is_locked
from smolvm_async.foundation.tail import QUOTED, printable
from smolvm_async.state.directory import find_directory, open_directory
from smolvm_async.state.names import SIDECARS, log_name

PROCESSES = ("qemu", *sorted(SIDECARS), "owner")  # the processes of a VM that write a log
POLL = 0.2  # seconds between two reads


async def read_log(
    vm_id: str,
    process: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    follow: bool = False,
) -> AsyncIterator[str]:
    """Yield the end of a process's stdout and stderr as text, at most 512 KiB.

    `process` is one of `PROCESSES`. If `follow` is true, also yield new text as long as a process
    holds the lock on the VM's directory.
    """
    path = make_data_dir(data_dir) / check_vm_id(vm_id)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with _open(path, log_name(process)) as file:
        while True:
            final = not (follow and _held(path))
            if os.fstat(file.fileno()).st_size < file.tell():
                file.seek(0)  # the writer emptied the full log, or the VM was started again
            if text := decoder.decode(file.read(), final):
                yield text
            if final:
                return
            await asyncio.sleep(POLL)


def log_end(path: Path, process: str) -> str:
    """Return the end of a process's log in the VM's directory `path`; empty if it is gone."""
    with contextlib.suppress(SmolVMError, OSError), _open(path, log_name(process)) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - QUOTED))
        return printable(file.read(QUOTED).decode(errors="replace")).strip()
    return ""


def _open(path: Path, name: str) -> BinaryIO:
    directory = find_directory(path)
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return open(os.open(name, flags, dir_fd=directory), "rb")
    except FileNotFoundError:
        return open(os.devnull, "rb")  # the process was never started
    finally:
        os.close(directory)


def _held(path: Path) -> bool:
    try:
        directory = open_directory(path)
    except OSError:
        return False
    try:
        return is_locked(directory)
    finally:
        os.close(directory)
