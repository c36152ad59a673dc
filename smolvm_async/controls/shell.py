"""Commands and files in a guest, over the VM's channel: SSH, or the guest's agent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from smolvm_async.controls.commands.commands import Commands
from smolvm_async.controls.commands.processes import Processes
from smolvm_async.controls.commands.transport import Transport
from smolvm_async.controls.contents import Contents, FileAccess
from smolvm_async.controls.files.environment import Environment
from smolvm_async.controls.files.files import Files
from smolvm_async.controls.files.transport import GuestFiles
from smolvm_async.controls.information import Information
from smolvm_async.controls.interface import running
from smolvm_async.controls.observation import Observation
from smolvm_async.errors import VMTimeoutError
from smolvm_async.qemu.events import BootState
from smolvm_async.qemu.guest_agent import GuestAgent

if TYPE_CHECKING:  # `import smolvm_async` does not need it
    from smolvm_async.controls.channels import GuestChannel


class Shell(Commands, Processes, Files, Contents, Environment, Information, Observation):
    """`AsyncSmolVM`'s commands and files. Each method waits until the guest is `ready`."""

    async def _channel(self, feature: str) -> GuestChannel:
        """Wait until the guest is ready, and return the channel to it.

        Args:
            feature: The method that needs the channel.

        Raises:
            UnsupportedError: The channel is the agent, and the guest has no agent.
        """
        from smolvm_async.controls.channels import channel_to

        late: VMTimeoutError | None = None
        try:
            await self.wait_for(BootState.READY)
        except VMTimeoutError as error:
            if self.boot_state is not BootState.OPERATING_SYSTEM:
                raise
            late = error
        profile = self._vm.config.profile
        channel = channel_to(running(self._vm), profile)
        if await channel.missing():
            raise profile.without_agent(feature) from late
        if late is not None:
            raise late
        return channel

    @property
    def _shells(self) -> Sequence[str]:
        return self._vm.config.profile.shells

    def _has_windows_paths(self) -> bool:
        return self._vm.config.profile.name == "windows"

    async def _transport(self, feature: str) -> Transport:
        return (await self._channel(feature)).transport()

    async def _files(self, feature: str) -> AbstractAsyncContextManager[GuestFiles]:
        return (await self._channel(feature)).files()

    async def _file_access(self, feature: str) -> FileAccess:
        return (await self._channel(feature)).access()

    async def _agent(self, feature: str) -> GuestAgent | None:
        return (await self._channel(feature)).agent

    def _require(self, feature: str) -> None:
        self._vm.config.profile.require(feature)
        running(self._vm)
