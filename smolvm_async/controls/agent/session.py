"""The use of a guest agent by one process: what has to be undone in the guest, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from smolvm_async.errors import SmolVMError
from smolvm_async.foundation.fork import end_in_child
from smolvm_async.foundation.tasks import end_tasks, settle, take_exception
from smolvm_async.qemu.guest_agent import GuestAgent
from smolvm_async.qemu.pauses import Pauses

ENDING = 2.0  # seconds that a call waits for its cleanup in the guest


class Session:
    """The guest agent, and the cleanup in the guest that goes on after its call.

    Attributes:
        agent: The agent.
        pauses: Whether the guest is paused.
        explain: Adds the VM's troubles to the error of a deadline; see `Troubles.explain()`.
    """

    def __init__(
        self,
        agent: GuestAgent,
        pauses: Pauses,
        explain: Callable[[Any], Any] = lambda error: error,
    ) -> None:
        self.agent = agent
        self.pauses = pauses
        self.explain = explain
        self._endings: set[asyncio.Task[None]] = set()

    async def end(self, ending: Coroutine[Any, Any, None]) -> None:
        """Run `ending`, which cleans up in the guest.

        This waits even if the caller is cancelled, but at most 2 s: if the guest hangs, `ending`
        goes on in the background. Its errors mean that the agent has ended, or the guest.
        """
        await settle(asyncio.wait([self.go_on(ending)], timeout=ENDING))

    def go_on(self, ending: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `ending` in the background."""
        end_in_child(ending)
        task = asyncio.ensure_future(ending)
        self._endings.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._endings.discard(task)
        error = take_exception(task)
        if error is not None and not isinstance(error, SmolVMError):
            context = {"message": "a cleanup in a guest failed", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)

    async def close(self) -> None:
        """Wait for the end of all cleanups, after QEMU has ended or this process has detached."""
        await end_tasks(*self._endings)
