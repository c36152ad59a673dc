"""The `async with` block around a VM or a fleet.

When a VM crashes, the task inside the block may be waiting for anything, so the block cancels it.
asyncio delivers a single `CancelledError`, however many callers cancelled the task. The task's
counter tells them apart: each `Task.cancel()` adds 1 to `Task.cancelling()`, and `leave()` takes
the block's own requests back with `Task.uncancel()`. If the counter is then back where it was on
entering, only the block cancelled the task, and the failure replaces the `CancelledError`. If it is
higher, somebody else (a timeout, a task group, an outer block) has cancelled the task too.

So one exception leaves the block, the first of:
1. the cancellation by somebody else, with the failure as a note;
2. the failure, with the body's exception as its cause. `KeyboardInterrupt` and its like are
   replaced only if the block had cancelled the body before;
3. the body's own exception.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class Block:
    """The task inside an `async with` block, and the block's requests to cancel it."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._others = 0  # requests to cancel the task that others had made when it entered
        self._own = 0  # requests of this block

    @property
    def entered(self) -> bool:
        """True while a task is inside."""
        return self._task is not None

    @property
    def cancelled(self) -> bool:
        """True if the block has cancelled the task that is inside."""
        return self._own > 0

    def enter(self) -> None:
        """Note the current task as the one inside."""
        self._task = asyncio.current_task()
        assert self._task is not None
        self._others = self._task.cancelling()

    def cancel(self) -> None:
        """Cancel the task inside, if there is one, because of a failure."""
        if self._task is not None and self._task.cancel():
            self._own += 1

    async def leave(
        self,
        end: Awaitable[None],
        error: BaseException | None,
        failure: Callable[[], Exception | None],
    ) -> None:
        """End the VMs, and raise the exception that is to leave the block, if any.

        Args:
            end: Ends the VMs; if it is cancelled, it first ends them all the same.
            error: The exception that left the body, if any.
            failure: Returns the failure, if any; called after `end`.
        """
        task, own = self._task, self._own
        self._task, self._own = None, 0
        late: asyncio.CancelledError | None = None
        try:
            await end
        except asyncio.CancelledError as cancellation:
            error = late = cancellation
        finally:
            only_ours = own > 0
            if own and task is not None and task is asyncio.current_task():
                for _ in range(own):
                    only_ours = task.uncancel() <= self._others
        reason = failure()
        if isinstance(error, asyncio.CancelledError) and not only_ours:
            if reason is not None:
                for each in reason.exceptions if isinstance(reason, ExceptionGroup) else [reason]:
                    error.add_note(str(each))
            raise error
        replaceable = only_ours or error is None or isinstance(error, Exception)
        if reason is not None and reason is not error and replaceable:
            raise reason from error
        if late is not None:
            raise late
