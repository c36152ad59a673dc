"""Runs a scenario in an event loop that counts every suspension of every task in it.

So "the n-th await" is well defined: one of the scenario, or of any task that the library makes. A
fault is injected there, and the leftovers of the run are looked for.
"""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import os
import random
import signal
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import smolvm_async
from smolvm_async import SmolVMError
from tests.conftest import children, descriptors

PACKAGE = str(Path(smolvm_async.__file__).parent)
HANG = 40.0  # seconds for one run, which takes 0.1 s
SETTLED = 5.0  # seconds for tasks and threads that end by themselves
PROGRAMS = ("qemu-system-x86_64", "swtpm")

Scenario = Callable[[], Coroutine[Any, Any, None]]
# A fault begins at its point. Each number that it yields is the number of suspensions after which
# it goes on. It is closed when the scenario has ended.
Fault = Callable[["Run"], Generator[int, None, None]]


class Counted(Coroutine[Any, Any, Any]):
    """The coroutine of a task. It reports each of its suspensions."""

    def __init__(self, inner: Any, tell: Callable[[Any], None]) -> None:
        self._inner = inner
        self._tell = tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # anyio and repr() look at cr_frame and the like

    def send(self, value: Any) -> Any:
        awaited = self._inner.send(value)
        self._tell(self._inner)
        return awaited

    def throw(self, *error: Any) -> Any:
        awaited = self._inner.throw(*error)
        self._tell(self._inner)
        return awaited

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise AssertionError("only tasks have it")


def awaits(coroutine: Any) -> Iterator[str]:
    """Yield the lines of the library at which a coroutine is suspended, outermost first."""
    while coroutine is not None:
        for prefix, following in (("cr", "await"), ("gi", "yieldfrom"), ("ag", "await")):
            frame = getattr(coroutine, f"{prefix}_frame", None)
            if frame is not None:
                path = frame.f_code.co_filename
                if path.startswith(PACKAGE):
                    yield f"{path.removeprefix(f'{PACKAGE}/')}:{frame.f_lineno}"
                coroutine = getattr(coroutine, f"{prefix}_{following}")
                break
        else:  # what `async with` awaits of an asynccontextmanager shows its generator to gc only
            inner = gc.get_referents(coroutine) if "asend" in type(coroutine).__name__ else []
            found = [thing for thing in inner if isinstance(thing, types.AsyncGeneratorType)]
            coroutine = found[0] if found else None


@dataclass
class Run:
    """One run of a scenario.

    Attributes:
        fault: The fault to inject.
        point: The number of the suspension at which the fault is injected; 0 for no fault.
        count: The number of suspensions so far.
        counting: False while the scenario does what another scenario does with the same faults.
        struck: True if the fault found something to strike.
        cancelled: True if the fault cancelled the scenario.
        ended_cancelled: True if the scenario ended as cancelled.
        error: The exception of the scenario.
        raised_at: The lines that the exception went through, outermost first.
        site: The place of the task that was suspended at the point.
        sites: All places in the library at which a task was suspended.
        complaints: All problems that were found.
    """

    fault: Fault | None = None
    point: int = 0
    count: int = 0
    counting: bool = True
    struck: bool = False
    cancelled: bool = False
    ended_cancelled: bool = False
    error: BaseException | None = None
    raised_at: tuple[str, ...] = ()
    site: str = ""
    sites: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)
    _user: asyncio.Task[None] | None = None
    _going: Generator[int, None, None] | None = None
    _due: int = 0

    def cancel(self) -> None:
        """Cancel the scenario."""
        assert self._user is not None
        if self._user.cancel():
            self.struck = self.cancelled = True

    def signal(self, number: signal.Signals, *names: str) -> None:
        """Send a signal to the children that are, or are about to execute, these programs."""
        for pid in children():
            with suppress(FileNotFoundError, ProcessLookupError):
                words = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                )
                if any(Path(word).name in names for word in words):
                    os.kill(pid, number)
                    self.struck = True

    def problems(self) -> list[str]:
        """Return all complaints, and each problem with how the scenario ended."""
        found = list(self.complaints)
        if self.cancelled and not self.ended_cancelled:
            found.append(f"the cancellation was swallowed: {self.error!r}")
        if self.ended_cancelled and not self.cancelled:
            found.append("it ended as cancelled, but was not cancelled")
        if self.error is not None and not isinstance(self.error, SmolVMError):
            found.append(f"it raised {self.error!r}, from {self.raised_at}")
        return found

    async def main(self, scenario: Scenario) -> None:
        """Run the scenario; afterwards the loop must have no task."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._complain)
        loop.set_task_factory(self._make_task)
        _running.set(self)
        self._user = asyncio.ensure_future(scenario())
        self._user.add_done_callback(self._lift)
        await asyncio.wait([self._user], timeout=HANG)
        if not self._user.done():
            self.complaints.append(f"it hangs:\n{stacks()}")
            self._lift()
            self.signal(signal.SIGKILL, *PROGRAMS)
            self._user.cancel()
            await asyncio.wait([self._user], timeout=SETTLED)
            return
        deadline = time.monotonic() + SETTLED
        while len(asyncio.all_tasks()) > 1 and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        if len(asyncio.all_tasks()) > 1:
            self.complaints.append(f"tasks are left:\n{stacks()}")
        self.ended_cancelled = self._user.cancelled()
        self.error = None if self.ended_cancelled else self._user.exception()
        self._user = None

    def _make_task(self, loop: asyncio.AbstractEventLoop, inner: Any, **options: Any) -> Any:
        return asyncio.Task(Counted(inner, self._suspended), loop=loop, **options)

    def _suspended(self, coroutine: Any) -> None:
        if not self.counting or self._user is None or self._user.done():
            return
        self.count += 1
        where = list(awaits(coroutine))
        self.sites.update(where)
        if self.count == self.point and self.fault is not None:
            self.site = " ".join(where)
            self._going, self._due = self.fault(self), self.count
        if self._going is not None and self.count == self._due:
            # Once the task really is suspended, and before anything else happens.
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._going is not None and self._user is not None and not self._user.done():
            try:
                self._due = self.count + next(self._going)
            except StopIteration:
                self._going = None

    def _lift(self, _: object = None) -> None:
        if self._going is not None:
            self._going.close()

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context["message"] != "socket.accept() out of system resource":  # it tries again
            self.complaints.append(f"asyncio complains: {context!r}")


_running: ContextVar[Run] = ContextVar("_running")


def count_awaits(counting: bool) -> None:
    """Count the scenario's awaits from here on, or do not: another scenario has faults at them."""
    _running.get().counting = counting


def stacks() -> str:
    """Return the place of every task."""
    text = io.StringIO()
    for task in asyncio.all_tasks():
        print(task, *awaits(task.get_coro()), sep="\n    ", file=text)
    return text.getvalue()


@contextmanager
def watched(complaints: list[str]) -> Iterator[None]:
    """Compare processes, descriptors and threads before and after, and gather Python's warnings."""
    processes, files, threads = children(), descriptors(), threading.active_count()

    def unraisable(event: Any) -> None:
        complaints.append(f"not raised: {event.exc_value!r} in {event.object!r}")

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
            gc.collect()  # objects that warn of being forgotten do so now
        complaints += [f"a warning: {warning.message}" for warning in caught]
    finally:
        sys.unraisablehook = hook
    deadline = time.monotonic() + SETTLED
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.001)
        gc.collect()  # the thread ends with its loop, which it may have held a moment ago
    if threading.active_count() > threads:
        complaints.append(f"threads are left: {threading.enumerate()}")
    if left := children() - processes:
        complaints.append(f"processes are left: {left}")
    if opened := {fd: link for fd, link in descriptors().items() if files.get(fd) != link}:
        complaints.append(f"descriptors are left: {opened}")


def run_once(scenario: Scenario, fault: Fault | None = None, point: int = 0) -> Run:
    """Run a scenario in a loop of its own, with a fault at the n-th suspension."""
    run = Run(fault, point)
    with watched(run.complaints):
        asyncio.run(run.main(scenario))
        if run.error is not None:
            frames = traceback.extract_tb(run.error.__traceback__)
            run.raised_at = tuple(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        _forget_frames(run.error)
    return run


def at_the_awaits(scenario: Scenario, fault: Fault, stride: int) -> Iterator[Run]:
    """Yield runs with a fault at every `stride`-th await from a random one on, then one without."""
    for point in itertools.count(random.SystemRandom().randint(1, stride), stride):
        run = run_once(scenario, fault, point)
        yield run
        if run.count < point:
            break


def _forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks: they keep the loop and its objects alive."""
    while error is not None:
        error.__traceback__ = None
        _forget_frames(error.__cause__)
        error = error.__context__
