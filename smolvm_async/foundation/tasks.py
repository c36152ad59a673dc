"""Tasks and threads: waiting that survives cancellation, and work that several tasks share."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import anyio

from smolvm_async.errors import HostError
from smolvm_async.foundation.progress import Progress, ProgressCallback, report

with contextlib.suppress(ImportError):
    # anyio imports its backend at its first use, which would block the event loop for over 10 ms.
    import anyio._backends._asyncio

T = TypeVar("T")


# Cleanup must run to its end: a process that is not reaped, or a file that is not removed, stays
# behind. But a cancellation can arrive at any await, and two kinds of it exist:
#
# - A cancelled anyio scope raises CancelledError at every await inside it, again and again. Without
#   a shield, each wait of the cleanup would end at once.
# - Task.cancel(), asyncio's own, raises CancelledError once per call, at the current await.
#   anyio's shield does not stop it: a second Ctrl-C, or a caller's timeout, pierces the shield.
#
# So a shield is not enough. `settle` runs the work in a task of its own, which nobody cancels, and
# waits for this task, not with the task's own await, since a cancelled await cancels the awaited
# task, but with asyncio.wait, which leaves it alone. Each Task.cancel() ends one wait; the loop
# remembers it and waits again. The shield keeps anyio's scopes out meanwhile, or the loop would
# spin. When the work has ended, the cancellation is raised: late, but never lost. The work's result
# is then dropped, and its exception is taken, or asyncio would log it as "never retrieved".


async def settle(work: Awaitable[T]) -> T:
    """Wait until `work` has ended, even if the caller is cancelled once or many times.

    Args:
        work: A future, or a coroutine, which gets a task of its own.

    Raises:
        asyncio.CancelledError: After `work` has ended, if the caller was cancelled meanwhile.
    """
    future = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancellation = error
    if cancellation is not None:
        take_exception(future)
        raise cancellation
    return future.result()


def take_exception(future: asyncio.Future[Any]) -> BaseException | None:
    """Return the exception of a future that is done; `None` if cancelled or if it has a result.

    asyncio logs an exception that nobody takes. This is also a callback for `add_done_callback`.
    """
    return None if future.cancelled() else future.exception()


def has_result(future: asyncio.Future[Any]) -> bool:
    """Return whether a future is done, was not cancelled and raised nothing."""
    return future.done() and not future.cancelled() and future.exception() is None


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended; drop their results. See `settle`."""
    for task in tasks:
        task.cancel()
    if tasks:
        await settle(asyncio.wait(tasks))
    for task in tasks:
        take_exception(task)


# An executor for each loop, not for each process: after a fork() the child's loops get threads of
# their own; the parent's thread does not exist in the child. The thread ends once its loop is
# garbage-collected.
_workers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ThreadPoolExecutor] = (
    weakref.WeakKeyDictionary()
)


def submit(function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    """Run `function` in the loop's one worker thread, after everything submitted before.

    It runs to its end, whether or not a task waits. The executor's future is not a task: so
    `asyncio.run`, which cancels all tasks at its end, cannot separate it from the thread.

    Raises:
        HostError: If the host cannot start a thread.
    """
    loop = asyncio.get_running_loop()
    worker = _workers.get(loop)
    if worker is None:
        worker = _workers[loop] = ThreadPoolExecutor(1, "smolvm-async")
    try:
        return _submit(worker, function, arguments)
    except RuntimeError as error:
        del _workers[loop]  # and its queue: a later thread would still run the function
        raise HostError(
            f"This host cannot start a thread: {error}.",
            hint="End other processes, or raise the limit of processes (ulimit -u).",
            missing=("threads",),
        ) from error


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run `function`, which must be short, in the loop's worker thread, to its end.

    See `settle`. The loop has one such thread, however many VMs start at once.
    """
    return await settle(submit(function, *arguments))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Suspend garbage collection in the block, which makes very many objects that stay.

    During an import of hundreds of modules the collector visits all objects of the process, and
    stops every thread for 15 to 30 ms. Objects made in the block count as old afterwards.
    """
    if not gc.isenabled() or gc.get_freeze_count():  # the user manages garbage collection
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()
        gc.enable()


async def in_background(function: Callable[..., T], *arguments: object) -> T:
    """Run `function`, which may take seconds, in a thread of the loop's default pool, to its end.

    See `settle`. It does not delay the short functions of `in_thread`.
    """
    return await settle(_submit(None, function, arguments))


def _submit(
    executor: ThreadPoolExecutor | None, function: Callable[..., T], arguments: tuple[object, ...]
) -> asyncio.Future[T]:
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()
    return loop.run_in_executor(executor, context.run, function, *arguments)


@contextlib.asynccontextmanager
async def acquired(getting: Awaitable[T], give_up: Callable[[T], Any]) -> AsyncIterator[T]:
    """Acquire a resource for the time of the block.

    Args:
        getting: Returns the resource; runs to its end, see `settle`.
        give_up: Releases the resource at the end, also if the wait for it was cancelled. If it
            returns an awaitable, this is awaited.
    """
    future = asyncio.ensure_future(getting)
    try:
        yield await settle(future)
    finally:
        if has_result(future):
            ending = give_up(future.result())
            if inspect.isawaitable(ending):
                await settle(ending)


def first_of(errors: BaseExceptionGroup[Exception]) -> Exception:
    """Return the first error of a task group, however deeply it is nested."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


class Slots:
    """A semaphore for each event loop, which `count` tasks may hold at the same time.

    It is anyio's: a semaphore of asyncio's that a task has waited for keeps a reference to its
    loop, which would never be freed.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._of: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, anyio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    def of_this_loop(self) -> anyio.Semaphore:
        """Return the running loop's semaphore."""
        return self._of.setdefault(asyncio.get_running_loop(), anyio.Semaphore(self._count))


class _SharedTask(Generic[T]):
    def __init__(self, make: Callable[[ProgressCallback], Coroutine[Any, Any, T]]) -> None:
        self.listeners: list[ProgressCallback | None] = []  # one for each caller that waits
        self.task = asyncio.ensure_future(make(self._report))

    def _report(self, progress: Progress) -> None:
        for listener in list(self.listeners):
            report(listener, progress)


class Shared(Generic[T]):
    """Run work once per key.

    Callers with the same key share the running task; it is cancelled when the last caller stops
    waiting.
    """

    def __init__(self) -> None:
        self._running: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[Hashable, _SharedTask[T]]
        ] = weakref.WeakKeyDictionary()

    async def join(
        self,
        key: Hashable,
        make: Callable[[ProgressCallback], Coroutine[Any, Any, T]],
        on_progress: ProgressCallback | None,
    ) -> T:
        """Return the work's result, or raise its exception; `make` starts it if it is not running.

        `on_progress` receives the progress of the work while this caller waits.
        """
        running = self._running.setdefault(asyncio.get_running_loop(), {})
        shared = running.get(key)
        if shared is None or shared.task.done():
            shared = running[key] = _SharedTask(make)
        shared.listeners.append(on_progress)
        try:
            await asyncio.wait([shared.task])
            return shared.task.result()
        except asyncio.CancelledError:
            if len(shared.listeners) == 1 and not shared.task.done():
                if running.get(key) is shared:
                    del running[key]  # a later caller starts the work again
                await end_tasks(shared.task)
            raise
        finally:
            shared.listeners.remove(on_progress)
            if shared.task.done() and running.get(key) is shared:
                del running[key]
