"""The clock of a Linux guest, which stands still while the VM is paused.

After each pause, whoever ended it, the owner sets the clock of a guest that is ready. The waiting
commands of all processes go on after that (see `Pauses.hold()`), so they see the right time. If the
guest is still booting, the clock is set as soon as the guest is ready.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from smolvm_async.controls.ssh.execution import run_apart
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.script import as_root
from smolvm_async.errors import ConnectionLostError
from smolvm_async.foundation.log import get_logger

logger = get_logger(__name__)

PATIENCE = 5.0  # seconds to set the clock; usually, this takes 0.1 s
QUOTED = 200  # characters of the guest's answer in a warning
PROBLEM = "the guest's clock is late by the pause, and could not be set: %s"


class GuestClock:
    """The clock of a guest, in the VM's owner.

    Args:
        link: The connection to the guest.
        start: Starts a background task that ends with the run.

    Attributes:
        late: Whether the guest was paused during its boot.
    """

    def __init__(
        self, link: Link, start: Callable[[Coroutine[Any, Any, str]], asyncio.Task[str]]
    ) -> None:
        self.late = False
        self._link = link
        self._start = start
        self._setting: asyncio.Task[str] | None = None

    def set_soon(self) -> None:
        """Set the clock in the background. New commands wait until this is done."""
        self._link.pauses.hold(True)
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
        setting = self._start(advance_clock(self._link))  # goes on if it takes longer
        try:
            await asyncio.wait([setting], timeout=PATIENCE)
        finally:
            if self._setting is asyncio.current_task():  # otherwise there was another pause
                self._link.pauses.hold(False)
        if self._link.pauses.active:  # the end of this pause sets the clock
            return ""
        problem = setting.result() if setting.done() else f"no answer within {PATIENCE:g} s"
        if problem:
            logger.warning(PROBLEM, problem)
        return problem

    async def set_if_late(self) -> None:
        """Set the clock of a guest that was paused during its boot."""
        if self.late and (problem := await advance_clock(self._link)):
            logger.warning(PROBLEM, problem)
        self.late = False


async def advance_clock(link: Link) -> str:
    """Set the guest's clock to the host's. Return the reason if this failed; otherwise empty."""
    said = bytearray()
    try:
        setting = await run_apart(link, lambda: script(time.time()), said.extend)
    except (ConnectionLostError, OSError) as error:
        return str(error)
    if setting.exit_code == 0:
        return ""
    return said.decode(errors="replace")[-QUOTED:].strip() or "the connection was lost"


def script(now: float) -> str:
    """Return a script that sets the clock, as root, unless the clock shows `now` or later.

    A slow guest may run the script late. So the script never turns the clock back. A `date` that
    is not GNU's may refuse fractions of a second.
    """
    to_set = (
        f'[ "$(date +%s)" -ge {int(now)} ] || date -s @{now:.3f} >/dev/null '
        f"|| date -s @{int(now)} >/dev/null"
    )
    return as_root(to_set)
