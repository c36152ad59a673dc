"""Forked children: a child of fork() must not touch what its parent owns.

The child has a copy of every Python object, but shares the kernel's side of every descriptor. A
lock lasts until both processes have closed it, both read from the same sockets, and the child's
copy of an event loop would change the parent's epoll and take its wake-ups. So a child does the
following before it runs any other Python code:

1. It replaces its copies of this library's descriptors by /dev/null. The numbers stay in use, so a
   late `os.close()` closes nothing else.
2. It gives its copies of the event loops an epoll and wake-up sockets of their own, so that the end
   of `asyncio.run()` in the child does not harm the parent.
3. It becomes another `Process`, so that objects of the parent know that they are only copies.

Coroutines of the parent end in the child at their next call of `end_in_child`, instead of waiting
or cleaning up. Only the child's own event loops work.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import re
import select
import selectors
import socket
import sys
import weakref
from pathlib import Path
from typing import Any

from smolvm_async.errors import SmolVMError, VMNotRunningError


class Process:
    """This process: objects keep it, to find out whether they are copies in a forked child."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    @property
    def is_this(self) -> bool:
        """False in a forked child of the process."""
        return self is _process

    def check(self, name: str, hint: str) -> None:
        """Raise a `VMNotRunningError` in a forked child. `name` is the owned object's."""
        if not self.is_this:
            raise VMNotRunningError(
                f"{name} belongs to process {self.pid}: this process is a forked child of that "
                "process, and cannot use what its parent owns.",
                hint=hint,
            )


_process = Process()
_private: dict[int, tuple[int, int]] = {}  # device and inode by descriptor
_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
_inherited: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
_is_child = False


def this_process() -> Process:
    """Return the running process; a forked child is another `Process`."""
    return _process


def private(fd: int) -> int:
    """Keep an open descriptor from forked children, and return it.

    The number may be closed and used again without notice: a child replaces only the same file.
    """
    status = os.fstat(fd)
    _private[fd] = (status.st_dev, status.st_ino)
    return fd


def close_private(fd: int) -> None:
    """Close a private descriptor. Needed where the user may open the same file again."""
    _private.pop(fd, None)
    os.close(fd)


def uses_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Note that this library works in an event loop."""
    _loops.add(loop)


def end_in_child(work: object = None) -> None:
    """In a forked child, end a coroutine that began in the parent; drop `work`, its next step.

    An exception that is under way, such as `SystemExit` in a `finally` block, goes on.

    Raises:
        SmolVMError: No event loop runs, so this is the coroutine that called fork().
        asyncio.CancelledError: The copy of a parent's loop runs, as at the end of `asyncio.run()`.
    """
    if not _is_child:
        return
    loop = asyncio._get_running_loop()
    if loop is not None and loop not in _inherited:
        return
    if inspect.iscoroutine(work):
        work.close()
    if (error := sys.exception()) is not None:
        raise error
    if loop is not None:
        raise asyncio.CancelledError
    raise SmolVMError(
        f"Process {os.getpid()} is a forked child: its parent's event loop does not run here.",
        hint="Run the call in an event loop of this process: asyncio.run().",
    )


def _begin_child() -> None:
    global _process, _is_child
    _process, _is_child = Process(), True
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd, identity in _private.items():
        with contextlib.suppress(OSError):
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == identity:
                os.dup2(nowhere, fd, inheritable=False)
    os.close(nowhere)
    _private.clear()
    for loop in list(_loops):
        _inherited.add(loop)
        _separate(loop)


def _separate(loop: Any) -> None:
    """Give a copy of a loop kernel objects of its own."""
    if loop.is_closed():
        return
    if hasattr(loop, "_get_backend_id"):
        _separate_uvloop(loop._get_backend_id())
    selector = getattr(loop, "_selector", None)
    if not isinstance(selector, selectors.EpollSelector):
        return
    for new, old in zip(socket.socketpair(), (loop._ssock, loop._csock), strict=True):
        with new:
            new.setblocking(False)
            os.dup2(new.fileno(), old.fileno(), inheritable=False)
    with select.epoll() as epoll:
        for key in selector.get_map().values():
            events = select.EPOLLIN if key.events & selectors.EVENT_READ else 0
            events |= select.EPOLLOUT if key.events & selectors.EVENT_WRITE else 0
            with contextlib.suppress(OSError):  # /dev/null has no events
                epoll.register(key.fd, events)
        os.dup2(epoll.fileno(), selector.fileno(), inheritable=False)


def _separate_uvloop(backend: int) -> None:
    """Replace the epoll of a uvloop, and its eventfds, with which threads wake the loop."""
    information = Path(f"/proc/self/fdinfo/{backend}").read_text()
    with select.epoll() as epoll:
        for number, events in re.findall(r"tfd:\s*(\d+)\s+events:\s*([0-9a-f]+)", information):
            fd = int(number)
            with contextlib.suppress(OSError):  # /dev/null has no events
                if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]":
                    new = os.eventfd(0)
                    os.dup2(new, fd, inheritable=False)
                    os.close(new)
                epoll.register(fd, int(events, 16))
        os.dup2(epoll.fileno(), backend, inheritable=False)


os.register_at_fork(after_in_child=_begin_child)
