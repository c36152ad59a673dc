"""The `async with` block around a VM or a fleet.

When a VM crashes, the task inside the block may be waiting for anything, so the block cancels the
task. asyncio delivers a single `CancelledError`, even if several callers cancelled the task. The
task's counter shows who did: each `Task.cancel()` adds 1 to `Task.cancelling()`, and `leave()`
subtracts the block's own requests with `Task.uncancel()`. If the counter is then as low as it was
on entering, only the block cancelled the task, and the failure replaces the `CancelledError`. If
the counter is higher, a timeout, a task group or an outer block has cancelled the task, too.

So one exception leaves the block, the first of these that exists:
1. The cancellation by another caller, with the failure as a note.
2. The failure, with the body's exception as its cause. The failure replaces a `KeyboardInterrupt`
   or a similar exception only if the block had cancelled the body before.
3. The body's own exception.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from smolvm_async.foundation.tasks import check_loop


class Block:
    """The task inside an `async with` block, and the block's requests to cancel it."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._others = 0  # other callers' cancel requests from before the task entered
        self._own = 0  # cancel requests of this block

    @property
    def entered(self) -> bool:
        """True while a task is inside the block."""
        return self._task is not None

    @property
    def cancelled(self) -> bool:
        """True if the block has cancelled the task inside the block."""
        return self._own > 0

    def enter(self) -> None:
        """Note that the current task is inside the block."""
        self._task = asyncio.current_task()
        assert self._task is not None
        self._loop = self._task.get_loop()
        self._others = self._task.cancelling()

    def check_loop(self, subject: str) -> None:
        """Check that an entered block is not used in another event loop."""
        if self.entered:
            check_loop(self._loop, subject)

    def cancel(self) -> None:
        """Cancel the task inside the block, if any, because of a failure."""
        if self._task is not None and self._task.cancel():
            self._own += 1

    async def leave(
        self,
        end: Awaitable[None],
        error: BaseException | None,
        failure: Callable[[], Exception | None],
    ) -> None:
        """End the VMs, and raise the exception that must leave the block, if any.

        Args:
            end: Ends the VMs, even if the awaiting task is cancelled.
            error: The exception that left the body, if any.
            failure: Returns the failure, if any. `leave()` calls it after `end`.
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
