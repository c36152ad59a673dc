"""Facts about the guest's operating system, for `AsyncSmolVM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smolvm_async.controls.commands.transport import OverTransport

if TYPE_CHECKING:
    from smolvm_async.controls.guest_info import GuestInfo
    from smolvm_async.qemu.guest_agent import GuestAgent


class Information(OverTransport):
    """`AsyncSmolVM`'s `guest_info()`."""

    async def _agent(self, feature: str) -> GuestAgent | None:
        """Wait until the guest is ready, and return its agent; `None` if the channel is SSH."""
        raise NotImplementedError

    async def guest_info(self) -> GuestInfo:
        """Return facts about the guest's operating system, such as its version and addresses.

        The guest tells them, through its agent or over SSH, so a guest that is not trusted may lie.
        A fact that the guest does not tell is `None`. No Windows was run.

        Raises:
            UnsupportedError: The guest has to run the QEMU guest agent, and does not.
            ConnectionLostError, VMTimeoutError, VMNotRunningError: See `run()`.
        """
        self._require("guest_info")
        from smolvm_async.controls.guest_info import from_agent, from_shell

        agent = await self._agent("guest_info")
        if agent is not None:
            return await from_agent(agent)
        transport = await self._transport("guest_info")
        return await from_shell(transport, windows="cmd" in self._shells)
