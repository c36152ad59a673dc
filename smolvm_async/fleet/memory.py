"""Promises of the host's memory to the VMs of this process's fleets, first come, first served.

QEMU takes its guest's memory from the host page by page, when the guest first uses a page. So just
after a VM has started, the host still counts nearly all of the VM's memory as available. A fleet
that only checked the host's memory would start far too many VMs, and the kernel would kill some of
them minutes later.

So each VM gets a promise of its size (memory plus QEMU's overhead) before it starts. The host does
not count the used part of a promise as available, so only the unused part must be subtracted:

    room = available memory of the host - HEADROOM - the sum of the unused parts of all promises

A VM waits until its size fits into the room. One queue serves all fleets and event loops of the
process. No VM overtakes another: small VMs could otherwise delay a large VM forever. The first VM
of the queue checks the host's memory when it arrives, when a promise ends, and every `LOOK_AGAIN`
seconds, since other programs may have freed memory. One check grants all promises that fit. If a VM
would not fit even after all promises have ended, it gets an error, since it would block the queue.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from smolvm_async.errors import HostError
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.host.memory import Memory, available_memory

HEADROOM = 0.05  # share of the host's memory that is never promised
LOOK_AGAIN = 0.5  # seconds between two checks of the host's memory


class Promise:
    """The memory that one VM may use once the promise is granted.

    Attributes:
        size: The promised MiB, including QEMU's overhead.
        used: Returns how many MiB the VM uses now. Pages that clones share do not count:
            the host counts them as available, and a clone that writes to one gets its own.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.used: Callable[[], int] = lambda: 0
        self.granted = self.looked = False
        self.news = asyncio.Event()  # set when the queue has moved
        self._loop = asyncio.get_running_loop()

    def unused(self) -> int:
        """Return how many more MiB the VM may use."""
        return max(0, self.size - self.used())

    def wake(self) -> None:
        """Set `news`, from any thread."""
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self.news.set)


class MemoryPromises:
    """The promises of this process and their queue; all event loops of the process share them."""

    def __init__(self, look: Callable[[], Memory] = available_memory) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._promises: set[Promise] = set()  # granted promises
        self._queue: deque[Promise] = deque()
        self._granted: list[Promise] = []  # granted promises whose VMs were not woken yet
        self._granting = threading.Lock()  # held while a thread checks the host's memory

    @property
    def wanted(self) -> bool:
        """True if a VM waits for memory."""
        return bool(self._queue)

    def room(self) -> int:
        """Return how many MiB can be promised now."""
        memory = self._look()
        unused = sum(promise.unused() for promise in list(self._promises))
        return int(memory.available - memory.total * HEADROOM) - unused

    def capacity(self) -> int:
        """Return how many MiB could be promised if all promises had ended."""
        return self.room() + sum(promise.size for promise in list(self._promises))

    @asynccontextmanager
    async def promised(self, size: int) -> AsyncIterator[Promise]:
        """Wait until `size` MiB can be promised, and promise them during the block.

        Raises:
            HostError: The size would not fit even if all promises had ended.
        """
        promise = Promise(size)
        with self._lock:
            self._queue.append(promise)
        try:
            await self._until_granted(promise)
            yield promise
        finally:
            with self._lock:
                self._promises.discard(promise)
                with suppress(ValueError):
                    self._queue.remove(promise)
            self._wake_first()

    async def _until_granted(self, promise: Promise) -> None:
        while not promise.granted:
            if self._is_first(promise):
                try:
                    await in_thread(self._grant, promise)
                finally:
                    # This task continues at once, before the tasks that are woken here.
                    self._wake_granted()
            if not promise.granted:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN):
                        await promise.news.wait()
                promise.news.clear()

    def _is_first(self, promise: Promise) -> bool:
        with self._lock:
            return bool(self._queue) and self._queue[0] is promise

    def _grant(self, promise: Promise) -> None:
        """Grant promises from the front of the queue while they fit: 32 are as fast as one."""
        with self._granting:
            room = self.room()
            with self._lock:
                while self._queue and self._queue[0].size <= room:
                    first = self._queue.popleft()
                    self._promises.add(first)
                    room -= first.size
                    first.granted = True
                    self._granted.append(first)
                capacity = room + sum(other.size for other in self._promises)
                # After the first check, accept a shortage: other programs may free memory.
                hopeless = promise.size > capacity and not (promise.looked and self._promises)
                promise.looked = True
                if not promise.granted and hopeless:
                    raise HostError(
                        f"a VM of {promise.size} MiB, QEMU's overhead included, does not fit: at "
                        f"most {capacity} MiB can be promised, even after all other VMs of this "
                        "process's fleets have ended.",
                        hint="Pass a smaller memory=, or free memory of the host.",
                        missing=("memory",),
                    )

    def _wake_granted(self) -> None:
        with self._lock:
            granted, self._granted = self._granted, []
        for promise in granted:
            promise.wake()

    def _wake_first(self) -> None:
        with self._lock:
            first = self._queue[0] if self._queue else None
        if first is not None:
            first.wake()


PROMISES = MemoryPromises()
# A forked child has no VMs yet, and a thread of its parent may have held the lock.
os.register_at_fork(after_in_child=PROMISES.__init__)  # type: ignore[misc]
