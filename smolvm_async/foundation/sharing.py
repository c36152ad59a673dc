"""One piece of work for all tasks that ask for it at the same time."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from smolvm_async.foundation.progress import Progress, ProgressCallback, report
from smolvm_async.foundation.tasks import end_tasks

T = TypeVar("T")


class _Flight(Generic[T]):
    def __init__(self, make: Callable[[ProgressCallback], Coroutine[Any, Any, T]]) -> None:
        self.listeners: list[ProgressCallback | None] = []
        self.task = asyncio.ensure_future(make(self._tell))

    def _tell(self, progress: Progress) -> None:
        for listener in list(self.listeners):
            report(listener, progress)


class Shared(Generic[T]):
    """Work by key: who asks while it goes on joins it. It ends when nobody waits any more."""

    def __init__(self) -> None:
        self._flights: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[Hashable, _Flight[T]]
        ] = weakref.WeakKeyDictionary()

    async def join(
        self,
        key: Hashable,
        make: Callable[[ProgressCallback], Coroutine[Any, Any, T]],
        on_progress: ProgressCallback | None,
    ) -> T:
        """What the work returns, or raises; `make` begins it, if nobody else has."""
        flights = self._flights.setdefault(asyncio.get_running_loop(), {})
        flight = flights.get(key)
        if flight is None or flight.task.done():
            flight = flights[key] = _Flight(make)
        flight.listeners.append(on_progress)
        try:
            await asyncio.wait([flight.task])
            return flight.task.result()
        except asyncio.CancelledError:
            if len(flight.listeners) == 1 and not flight.task.done():
                if flights.get(key) is flight:
                    del flights[key]  # who comes now begins anew
                await end_tasks(flight.task)
            raise
        finally:
            flight.listeners.remove(on_progress)
            if flight.task.done() and flights.get(key) is flight:
                del flights[key]
