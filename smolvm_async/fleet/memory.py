"""The memory of this process's fleets: promised to one VM at a time, in the order of asking.

What a VM was promised and has not touched yet is reserved: the host shows it as available. What it
has touched the host does not show any more. So a promise binds the difference, whoever made it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from smolvm_async.errors import HostError
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.host.memory import Memory, available_memory

HEADROOM = 0.05  # of the host's memory, which is promised to nobody
AGAIN = 0.5  # seconds until the host is asked again, which others may have freed memory of


class Promise:
    """What one VM may use.

    Attributes:
        size: MiB, with its overhead.
        touched: Tells how many MiB of it are in use.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.touched: Callable[[], int] = lambda: 0

    def rest(self) -> int:
        """MiB that it may still come to use."""
        return max(0, self.size - self.touched())


class _Turn:
    def __init__(self, promise: Promise) -> None:
        self.promise = promise
        self.granted = self.looked = False
        self._loop = asyncio.get_running_loop()
        self.news = asyncio.Event()

    def wake(self) -> None:
        with suppress(RuntimeError):  # its loop has been closed
            self._loop.call_soon_threadsafe(self.news.set)


class Ledger:
    """Who has been promised what; for all event loops of the process."""

    def __init__(self, look: Callable[[], Memory] = available_memory) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._promises: set[Promise] = set()
        self._turns: deque[_Turn] = deque()
        self._granted: list[_Turn] = []  # who does not know yet
        self._granting = threading.Lock()  # held while the host is looked at

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for memory."""
        return bool(self._turns)

    def room(self) -> int:
        """MiB that can be promised now.

        Raises:
            OSError: If the kernel does not tell.
        """
        memory = self._look()
        reserved = sum(promise.rest() for promise in list(self._promises))
        return int(memory.available - memory.total * HEADROOM) - reserved

    def capacity(self) -> int:
        """MiB that could be promised if nobody had been promised any.

        Raises:
            OSError: If the kernel does not tell.
        """
        return self.room() + sum(promise.size for promise in list(self._promises))

    @asynccontextmanager
    async def promised(self, size: int) -> AsyncIterator[Promise]:
        """Wait until there is room for `size` MiB, first come, first served, and have it.

        Raises:
            HostError: If there would be none even if all of ours gave theirs back.
        """
        promise = Promise(size)
        try:
            await self._wait_for_room(promise)
            yield promise
        finally:
            with self._lock:
                self._promises.discard(promise)
            self._wake()

    async def _wait_for_room(self, promise: Promise) -> None:
        turn = _Turn(promise)
        with self._lock:
            self._turns.append(turn)
        try:
            while not turn.granted:
                if self._is_first(turn):
                    try:
                        await in_thread(self._grant, turn)
                    finally:  # it goes on at once, and so before those that came later
                        self._wake_granted()
                if not turn.granted:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(AGAIN):
                            await turn.news.wait()
                    turn.news.clear()
        except BaseException:
            self._forget(turn)
            raise

    def _forget(self, turn: _Turn) -> None:
        with self._lock, suppress(ValueError):
            self._turns.remove(turn)
        self._wake()

    def _is_first(self, turn: _Turn) -> bool:
        with self._lock:
            return bool(self._turns) and self._turns[0] is turn

    def _grant(self, turn: _Turn) -> None:
        """Promise to those that come first, as long as there is room: to 32 as fast as to one."""
        with self._granting:
            room = self.room()
            with self._lock:
                while self._turns and self._turns[0].promise.size <= room:
                    first = self._turns.popleft()
                    self._promises.add(first.promise)
                    room -= first.promise.size
                    first.granted = True
                    self._granted.append(first)
                capacity = room + sum(promise.size for promise in self._promises)
                hopeless = turn.promise.size > capacity and not (turn.looked and self._promises)
                turn.looked = True  # what is short from now on is so for a while
                if not turn.granted and hopeless:
                    raise HostError(
                        f"a VM of {turn.promise.size} MiB, with QEMU's own, does not fit: "
                        f"{capacity} MiB can be promised, if all that others have is given back. "
                        "Pass a smaller memory=, or free memory of the host."
                    )

    def _wake_granted(self) -> None:
        with self._lock:
            granted, self._granted = self._granted, []
        for turn in granted:
            turn.wake()

    def _wake(self) -> None:
        with self._lock:
            first = self._turns[0] if self._turns else None
        if first is not None:
            first.wake()


LEDGER = Ledger()
