"""The clock of a guest, which stands still while the VM is paused.

After each pause, whoever ended it, the owner sets the clock of a guest that is ready. The waiting
commands of all processes go on after that (see `Pauses.hold()`), so they see the right time. If the
guest is still booting, the clock is set as soon as the guest is ready.

The VM's channel sets the clock: SSH (`ssh/clock.py`), or the agent (`agent/clock.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from smolvm_async.foundation.log import get_logger
from smolvm_async.qemu.pauses import Pauses

logger = get_logger(__name__)

PATIENCE = 5.0  # seconds to set the clock; usually, this takes 0.1 s
PROBLEM = "the guest's clock is late by the pause, and could not be set: %s"


class GuestClock:
    """The clock of a guest, in the VM's owner.

    Args:
        pauses: Holds the waiting commands.
        advance: Sets the clock, and returns the reason if this failed; otherwise empty.
        start: Starts a background task that ends with the run.

    Attributes:
        late: Whether the guest was paused during its boot.
    """

    def __init__(
        self,
        pauses: Pauses,
        advance: Callable[[], Coroutine[Any, Any, str]],
        start: Callable[[Coroutine[Any, Any, str]], asyncio.Task[str]],
    ) -> None:
        self.late = False
        self._pauses = pauses
        self._advance = advance
        self._start = start
        self._setting: asyncio.Task[str] | None = None

    def set_soon(self) -> None:
        """Set the clock in the background. New commands wait until this is done."""
        self._pauses.hold(True)
        self._setting = self._start(self._set_within_patience())

    async def set(self) -> str:
        """Set the clock, and wait for this, unless `set_soon()` is already at work.

        Return the reason if this failed or took too long; otherwise empty.
        """
        if self._setting is None or self._setting.done():
            self.set_soon()
        setting = self._setting
        assert setting is not None
        await asyncio.wait([setting])
        return setting.result()

    async def _set_within_patience(self) -> str:
        setting = self._start(self._advance())  # goes on if it takes longer
        try:
            await asyncio.wait([setting], timeout=PATIENCE)
        finally:
            if self._setting is asyncio.current_task():  # otherwise there was another pause
                self._pauses.hold(False)
        if self._pauses.active:  # the end of this pause sets the clock
            return ""
        problem = setting.result() if setting.done() else f"no answer within {PATIENCE:g} s"
        if problem:
            logger.warning(PROBLEM, problem)
        return problem

    async def set_if_late(self) -> None:
        """Set the clock of a guest that was paused during its boot."""
        if self.late and (problem := await self._advance()):
            logger.warning(PROBLEM, problem)
        self.late = False
