"""Pause a VM that nobody uses, and resume it at the next call: the argument `idle_timeout=`.

A VM is used
- by each call of a control, in any process, which begins with `VM.wake()`;
- by each session in the guest (a command, a transfer, a process, a terminal) as long as it is open;
- by each caller who waits for a boot state.

An attached process tells the owner about its sessions and waits: it calls `wake()` repeatedly.
A guest that is not ready may still be booting, so it is idle only after `Timeouts.boot`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import SmolVMError
from smolvm_async.foundation.log import get_logger
from smolvm_async.qemu.boot import BootStates
from smolvm_async.qemu.events import BootState
from smolvm_async.qemu.pauses import Pauses

logger = get_logger(__name__)


class Idleness:
    """The pause of a running VM that is idle, in the VM's owner.

    Args:
        last_use: Returns the time of the last use by this process, of `time.monotonic()`.
        pause: Pauses the VM.
        resume: Resumes the VM.

    Attributes:
        paused: Whether the VM is paused, or will be in a moment, because it was idle.
    """

    def __init__(
        self,
        config: VMConfig,
        boot: BootStates,
        pauses: Pauses,
        last_use: Callable[[], float],
        pause: Callable[[], Awaitable[None]],
        resume: Callable[[], Awaitable[str]],
    ) -> None:
        self.paused = False
        self._timeout = config.idle_timeout
        self._boot_timeout = config.timeouts.boot
        self._boot, self._pauses, self._last_use = boot, pauses, last_use
        self._pause, self._resume = pause, resume
        self._used = time.monotonic()
        self._turn = asyncio.Lock()
        self._ended = False

    async def wake(self) -> None:
        """Note a use of the VM; resume the VM if it was paused because it was idle."""
        self._used = time.monotonic()
        if self.paused:
            async with self._turn:
                if self.paused:
                    await self._resume()
                    self.paused = False
            self._used = time.monotonic()

    async def end(self) -> None:
        """Let `watch()` pause the VM no more, and wait for a pause that it has begun."""
        async with self._turn:
            self._ended = True

    async def watch(self) -> None:
        """Pause the VM each time that it is idle, until cancelled, or until `end()`."""
        timeout = self._timeout
        while timeout is not None and not self._ended:
            if self._pauses.active:
                await self._pauses.until_running()
                self.paused, self._used = False, time.monotonic()
            async with self._turn:
                left = self._deadline(timeout) - time.monotonic()
                if left <= 0 and not self._ended:
                    await self._pause_idle(timeout)
            await asyncio.sleep(min(max(left, 0.0), timeout))  # the deadline may come closer

    async def _pause_idle(self, timeout: float) -> None:
        logger.info("pausing the VM, which was idle for %g s", timeout)
        self.paused = True
        try:
            await self._pause()
        except SmolVMError as error:  # QEMU is busy, or ends
            self.paused, self._used = False, time.monotonic()
            logger.warning("the idle VM could not be paused: %s", error)

    def _deadline(self, timeout: float) -> float:
        used, changed = max(self._used, self._last_use()), self._boot.changed_at
        if self._boot.last.state is BootState.READY:
            return max(used, changed) + timeout
        return max(used + timeout, changed + self._boot_timeout)
