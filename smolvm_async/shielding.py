"""Work that has to end, however often its owner is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

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


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run `function` in a worker thread, to its end (see `settle`).

    The executor's future is no task: not even `asyncio.run`, which cancels all tasks at its end,
    parts us from the thread.
    """
    loop = asyncio.get_running_loop()
    return await settle(loop.run_in_executor(None, function, *arguments))
