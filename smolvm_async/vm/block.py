"""The `async with` block around a VM: a crash cancels it, and leaving it ends the VM."""

from __future__ import annotations

import asyncio
from typing import Any

from smolvm_async.controls.interface import VM
from smolvm_async.errors import VMNotRunningError


class Block:
    """The task that is inside the block, and who has cancelled it."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0  # requests that others had made when it was entered
        self._cancelled = False  # by us

    @property
    def entered(self) -> bool:
        """Whether a task is inside."""
        return self._task is not None

    def enter(self) -> None:
        """The current task enters."""
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()

    def cancel(self) -> None:
        """The VM has crashed."""
        if self._task is not None:
            self._cancelled = self._task.cancel()

    async def leave(self, vm: VM, error: BaseException | None) -> None:
        """The task leaves, by `error` or by the end of the block.

        Raises:
            VMCrashedError: If the VM has crashed, unless another exception matters more.
            asyncio.CancelledError: If somebody else cancelled it.
        """
        task, self._task = self._task, None
        ours, self._cancelled = self._cancelled, False
        try:
            await vm.leave(graceful=error is None)
        except asyncio.CancelledError as cancellation:
            await vm.leave(graceful=False)
            error = error or cancellation
        if ours and task is asyncio.current_task() and task is not None:
            ours = task.uncancel() <= self._cancelling
        crash = vm.run.failure if vm.run else None
        if isinstance(crash, VMNotRunningError):
            crash = None  # it has only been detached from
        if isinstance(error, asyncio.CancelledError) and not ours:
            raise error
        if error is crash:
            return  # it comes out by itself, or there is none
        if crash is not None and (ours or error is None or isinstance(error, Exception)):
            raise crash from error
