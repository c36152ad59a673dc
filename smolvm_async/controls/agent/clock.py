"""The clock of a guest, set through its agent. No Windows was run.

The agent of Linux sets the hardware clock, too, and reports an error if it cannot (in an image
without `hwclock`), although the clock is right then.
"""

from __future__ import annotations

import time

from smolvm_async.errors import GuestAgentError, SmolVMError
from smolvm_async.qemu.guest_agent import GuestAgent


async def advance_clock(agent: GuestAgent) -> str:
    """Set the guest's clock to the host's. Return the reason if this failed; otherwise empty."""
    try:
        now = time.time_ns()
        if await _shows(agent, now):  # the clock is never turned back
            return ""
        try:
            await agent.execute("guest-set-time", {"time": time.time_ns()})
        except GuestAgentError:
            if not await _shows(agent, now):
                raise
    except SmolVMError as error:
        return error.message
    return ""


async def _shows(agent: GuestAgent, now: int) -> bool:
    """Return whether the guest's clock shows `now`, in nanoseconds, or later."""
    shown = await agent.execute("guest-get-time")
    return type(shown) is int and shown >= now
