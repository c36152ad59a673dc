"""Work that has to end, however often its owner is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import anyio

from smolvm_async.errors import HostError

with contextlib.suppress(ImportError):
    # anyio imports it at its first use, which would stall the event loop for over 10 ms.
    import anyio._backends._asyncio

T = TypeVar("T")


async def settle(work: Awaitable[T]) -> T:
    """Wait for `work` to end, then let any cancellation that came meanwhile go on.

    A coroutine gets a task of its own. anyio's shield keeps the cancel scopes around the
    caller away; a native `Task.cancel()` pierces it, so the wait is repeated.

    Raises:
        asyncio.CancelledError: after `work` has ended, if the caller was cancelled.
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
        if not future.cancelled():
            future.exception()  # retrieved, or asyncio would log it
        raise cancellation
    return future.result()


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended, whatever becomes of them. See `settle`."""
    for task in tasks:
        task.cancel()
    if tasks:
        await settle(asyncio.wait(tasks))
    for task in tasks:
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio would log it


# One for each loop and not for each process: after a fork() the child's loops get workers of their
# own, where a shared one would be a thread that the child does not have. A worker's thread ends
# once its loop is collected.
_workers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ThreadPoolExecutor] = (
    weakref.WeakKeyDictionary()
)


def submit(function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    """Have the loop's one worker thread run `function`, after all that was submitted before.

    It runs to its end, whether or not anybody waits. The executor's future is no task: not even
    `asyncio.run`, which cancels all tasks at its end, parts us from the thread.

    Raises:
        HostError: If the host has no thread for us.
    """
    loop = asyncio.get_running_loop()
    worker = _workers.get(loop)
    if worker is None:
        worker = _workers[loop] = ThreadPoolExecutor(1, "smolvm-async")
    try:
        return _submit(worker, function, arguments)
    except RuntimeError as error:
        del _workers[loop]  # with what it has queued: a later thread would still run it
        raise HostError(f"{error}: end other processes, or raise their limit.") from error


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run `function`, which must be short, in the loop's worker thread, to its end.

    See `settle`. However many VMs start at once, the process has one thread more.
    """
    return await settle(submit(function, *arguments))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Have no garbage collected in the block, which makes very many objects that stay.

    Amid an import of hundreds of modules the collector looks at all the objects of the process,
    and stops every thread for 15 to 30 ms. What the block makes counts as old afterwards.
    """
    if not gc.isenabled() or gc.get_freeze_count():  # then it is the user's own affair
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
    """Run `function`, which may take seconds, in a thread of the loop's own pool, to its end.

    See `settle`. No VM waits for it.
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
    """Have what `getting` brings for the time of the block.

    Args:
        give_up: Called with it at the end, also if the wait for it was cancelled; what it returns
            is awaited if that can be.
    """
    future = asyncio.ensure_future(getting)
    try:
        yield await settle(future)
    finally:
        if future.done() and not future.cancelled() and future.exception() is None:
            ending = give_up(future.result())
            if inspect.isawaitable(ending):
                await settle(ending)


def first_of(errors: BaseExceptionGroup[Exception]) -> Exception:
    """The first error of a task group, however deep it is."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
