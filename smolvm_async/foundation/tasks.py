"""Tasks and threads: waits that a cancellation does not end, and work that several tasks share."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import anyio

from smolvm_async.errors import ConfigError, HostError
from smolvm_async.foundation.fork import end_in_child, uses_loop
from smolvm_async.foundation.progress import Progress, ProgressCallback, report

with contextlib.suppress(ImportError):
    # Import anyio's backend now: on first use, it would block the event loop for over 10 ms.
    import anyio._backends._asyncio

T = TypeVar("T")


# Cleanup must run to its end: a process that is not reaped, or a file that is not removed, stays
# behind. But a cancellation can arrive at any await, and there are two kinds of cancellation:
#
# - A cancelled anyio scope raises CancelledError at every await inside it, again and again. Without
#   a shield, each wait of the cleanup would end at once.
# - Task.cancel(), asyncio's own, raises CancelledError once per call, at the current await.
#   anyio's shield does not stop it, so a second Ctrl-C or a caller's timeout ends a shielded wait.
#
# So a shield is not enough. `settle` runs the work in a separate task, which nobody cancels. It
# waits for this task with asyncio.wait: a cancellation of `await task` would cancel the task, too.
# Each Task.cancel() ends one wait; the loop remembers the cancellation and waits again. The shield
# keeps anyio's scopes from ending each new wait, or the loop would spin. When the work has ended,
# `settle` raises the cancellation: late, but never lost. It drops the work's result and retrieves
# its exception, or asyncio would log the exception as "never retrieved".


async def settle(work: Awaitable[T]) -> T:
    """Wait until `work` has ended, even if the caller is cancelled once or many times.

    Args:
        work: A future, or a coroutine, which then runs in a task of its own.

    Raises:
        asyncio.CancelledError: After `work` has ended, if the caller was cancelled meanwhile.
    """
    end_in_child(work)
    future = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                end_in_child()  # where the work never ends
                cancellation = error
    if cancellation is not None:
        take_exception(future)
        raise cancellation
    return future.result()


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop.

    Raises:
        ConfigError: No asyncio event loop is running, as under trio.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigError(
            "no asyncio event loop is running: smolvm_async works with asyncio only, not with "
            "trio. Use asyncio.run(), or anyio.run() with backend='asyncio'."
        ) from None


def check_loop(loop: asyncio.AbstractEventLoop, subject: str) -> None:
    """Check that `subject`, which is in use in `loop`, is not called in another event loop.

    asyncio's own errors would not name the cause, and a call from another thread may hang. Code
    outside of any event loop may pass.

    Raises:
        ConfigError: Another event loop is running here.
    """
    with contextlib.suppress(RuntimeError):
        if asyncio.get_running_loop() is not loop:
            gone = loop.is_closed()
            raise ConfigError(
                f"{subject} belongs to another event loop{', which was closed' if gone else ''}: "
                + (
                    "keep one asyncio.run() around all uses of it, or make a new object."
                    if gone
                    else "await it there, such as with asyncio.run_coroutine_threadsafe(). To use "
                    "a VM in several event loops, attach to it with AsyncSmolVM.from_id()."
                )
            )


def take_exception(future: asyncio.Future[Any]) -> BaseException | None:
    """Return the exception of a done future; `None` if it was cancelled or has a result.

    asyncio logs exceptions that are never retrieved. Also use this with `add_done_callback`.
    """
    return None if future.cancelled() else future.exception()


def has_result(future: asyncio.Future[Any]) -> bool:
    """Return whether a future is done with a result, not with an exception or a cancellation."""
    return future.done() and not future.cancelled() and future.exception() is None


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended; drop their results. See `settle`."""
    for task in tasks:
        task.cancel()
    if tasks:
        await settle(asyncio.wait(tasks))
    for task in tasks:
        take_exception(task)


# Each loop has an executor with one thread, which ends once the loop is garbage-collected. One
# executor for the whole process would not work after a fork(): the parent's thread does not exist
# in the child.
_workers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ThreadPoolExecutor] = (
    weakref.WeakKeyDictionary()
)


def submit(function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    """Run `function` in the loop's only worker thread, after all functions submitted before.

    The function runs to its end, even if no task waits for it. The returned future is not a task,
    so `asyncio.run`, which cancels all tasks at its end, does not cancel the future.

    Raises:
        HostError: If the host cannot start a thread.
    """
    end_in_child()
    loop = running_loop()
    worker = _workers.get(loop)
    if worker is None:
        worker = _workers[loop] = ThreadPoolExecutor(1, "smolvm-async")
    try:
        return _submit(worker, function, arguments)
    except RuntimeError as error:
        del _workers[loop]  # with its queue, or a later thread would run the function
        raise no_thread(error) from error


def no_thread(error: RuntimeError) -> HostError:
    """Return the error for a host that cannot start a thread."""
    return HostError(
        f"This host cannot start a thread: {error}.",
        hint="Stop other processes, or raise the process limit (ulimit -u). In a container, a "
        "seccomp profile may refuse clone3(2): update the container runtime and libseccomp.",
        missing=("threads",),
    )


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run a short `function` in the loop's worker thread; wait for its end, even if cancelled.

    See `settle`. The loop has only one worker thread, even if many VMs start at once.
    """
    return await settle(submit(function, *arguments))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Suspend garbage collection during a block that makes very many permanent objects.

    During an import of hundreds of modules, the collector would visit all objects of the process
    and stop every thread for 15 to 30 ms. Objects made in the block count as old afterwards.
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
    """Run a slow `function` in the loop's default pool; wait for its end, even if cancelled.

    See `settle`. The function may take seconds: it does not delay the functions of `in_thread`.
    """
    return await settle(_submit(None, function, arguments))


def _submit(
    executor: ThreadPoolExecutor | None, function: Callable[..., T], arguments: tuple[object, ...]
) -> asyncio.Future[T]:
    end_in_child()
    loop = running_loop()
    uses_loop(loop)
    context = contextvars.copy_context()
    return loop.run_in_executor(executor, context.run, function, *arguments)


@contextlib.asynccontextmanager
async def acquired(getting: Awaitable[T], give_up: Callable[[T], Any]) -> AsyncIterator[T]:
    """Acquire a resource, and release it after the block.

    Args:
        getting: An awaitable that returns the resource; it runs to its end, see `settle`.
        give_up: Releases the resource, even if the wait for the resource was cancelled. If
            `give_up` returns an awaitable, the awaitable is awaited.
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

    These are anyio's semaphores: once a task has waited for an asyncio semaphore, the semaphore
    keeps a reference to its loop, so the loop would never be freed.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._of: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, anyio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    def of_this_loop(self) -> anyio.Semaphore:
        """Return the running loop's semaphore."""
        return self._of.setdefault(running_loop(), anyio.Semaphore(self._count))


class Turns(Slots):
    """Slots for work that is faster if few do it at a time, one for each processor.

    A holder may hang. So nobody waits for a slot longer than `PATIENCE` seconds.
    """

    PATIENCE = 10.0

    def __init__(self) -> None:
        super().__init__(len(os.sched_getaffinity(0)))

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Hold a slot during the block."""
        slots = self.of_this_loop()
        try:
            async with asyncio.timeout(self.PATIENCE):
                await slots.acquire()
        except TimeoutError:
            yield
            return
        try:
            yield
        finally:
            slots.release()


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
        """Return the work's result, or raise its exception; `make` starts work that is not running.

        `on_progress` receives the progress of the work while this caller waits.
        """
        running = self._running.setdefault(running_loop(), {})
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
