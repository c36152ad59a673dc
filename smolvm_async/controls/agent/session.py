"""The use of a guest agent by one process: what has to be undone in the guest, and when."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from smolvm_async.errors import SmolVMError
from smolvm_async.foundation.fork import end_in_child
from smolvm_async.foundation.tasks import end_tasks, settle, take_exception
from smolvm_async.qemu.arguments import AGENT_PORT
from smolvm_async.qemu.events import Event, PortChanged, Reset
from smolvm_async.qemu.guest_agent import GuestAgent
from smolvm_async.qemu.pauses import Pauses

ENDING = 2.0  # seconds that a call waits for its cleanup in the guest
# Files are removed when no command has ended for a while, or many have: one program removes all.
TIDY = 0.2  # seconds
FEW = 1 << 20  # bytes of garbage, of which the files of a command are at least
SMALL = 1 << 14  # bytes


class Session:
    """The guest agent, and the cleanup in the guest that goes on after its call.

    In an attached process, each call of the agent is a request to the VM's owner.

    Attributes:
        agent: The agent.
        pauses: Whether the guest is paused.
        explain: Adds the VM's troubles to the error of a deadline; see `Troubles.explain()`.
        watchers: Called with the event that the agent has ended, which forgets its commands then;
            `None` is the end of QEMU.
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
        self.watchers: set[Callable[[Event | None], None]] = set()
        self.env_turn = asyncio.Lock()  # for writers of the guest's environment variables
        self._endings: set[asyncio.Task[None]] = set()
        self._garbage: list[str] = []  # files in the guest that nobody needs any more
        self._garbage_size = 0  # bytes
        self._removing = False
        self._finishing = asyncio.Event()
        self._closed = False

    def on_event(self, event: Event) -> None:
        """Note that the agent has ended. Call this with every event of QEMU."""
        closed = isinstance(event, PortChanged) and event.port == AGENT_PORT and not event.open
        if closed or isinstance(event, Reset):
            self._tell(event)

    def _tell(self, event: Event | None) -> None:
        for watcher in [*self.watchers]:
            watcher(event)

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

    def remove(
        self, stem: str, size: int, remover: Callable[[list[str]], Awaitable[object]]
    ) -> None:
        """Remove the files of a command soon, in the background, many at once by `remover`.

        Args:
            stem: The command's stem; see `System.stem()`.
            size: The bytes of the files.
            remover: A function that removes the files of commands.
        """
        if self._closed:
            return
        self._garbage.append(stem)
        self._garbage_size += max(size, SMALL)
        if not self._removing:
            self._removing = True
            self.go_on(self._remove(remover))

    async def _remove(self, remover: Callable[[list[str]], Awaitable[object]]) -> None:
        try:
            while self._garbage:
                before = 0
                while before < self._garbage_size < FEW and not self._finishing.is_set():
                    before = self._garbage_size
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(TIDY):
                            await self._finishing.wait()
                stems, self._garbage, self._garbage_size = self._garbage, [], 0
                await remover(stems)
        finally:
            self._removing = False

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._endings.discard(task)
        error = take_exception(task)
        if error is not None and not isinstance(error, SmolVMError):
            context = {"message": "a cleanup in a guest failed", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)

    async def finish(self) -> None:
        """Wait at most 2 s until the guest is clean."""
        self._finishing.set()
        if self._endings:
            await asyncio.wait([*self._endings], timeout=ENDING)

    async def close(self) -> None:
        """End all commands and cleanups, after QEMU has ended or this process has detached."""
        self._closed = True
        self._tell(None)
        await end_tasks(*self._endings)
