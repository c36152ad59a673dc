"""Commands and files in a guest, over SSH or through the guest's agent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING

from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.commands.commands import Commands
from smolvm_async.controls.commands.transport import Transport
from smolvm_async.controls.contents import Contents, FileAccess
from smolvm_async.controls.files.environment import Environment
from smolvm_async.controls.files.files import Files
from smolvm_async.controls.files.transport import GuestFiles
from smolvm_async.controls.information import Information
from smolvm_async.controls.interface import running
from smolvm_async.controls.observation import Observation
from smolvm_async.controls.ssh.execution import SSHTransport
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.processes import Processes
from smolvm_async.controls.ssh.transfer import SFTPFiles
from smolvm_async.errors import VMTimeoutError
from smolvm_async.qemu.events import BootState
from smolvm_async.qemu.guest_agent import GuestAgent

if TYPE_CHECKING:  # few guests need it
    from smolvm_async.controls.agent.transfer import AgentFiles


class Shell(Commands, Processes, Files, Contents, Environment, Information, Observation):
    """`AsyncSmolVM`'s commands and files. Each method waits until the guest is `ready`."""

    async def _reach(self) -> Link:
        running(self._vm)
        await self.wait_for(BootState.READY)
        return running(self._vm).link

    async def _session(self, feature: str) -> Session:
        """Wait until the guest is ready, and return the way to its agent.

        Args:
            feature: The method that needs the agent.

        Raises:
            UnsupportedError: The guest has no agent.
        """
        late: VMTimeoutError | None = None
        try:
            await self.wait_for(BootState.READY)
        except VMTimeoutError as error:
            if self.boot_state is not BootState.OPERATING_SYSTEM:
                raise
            late = error
        session = running(self._vm).session
        if not await session.agent.present():
            raise self._vm.config.profile.without_agent(feature) from late
        if late is not None:
            raise late
        return session

    @property
    def _shells(self) -> Sequence[str]:
        return self._vm.config.profile.shells

    @property
    def _uses_agent(self) -> bool:
        return self._vm.config.profile.channels[0] == "agent"

    def _has_windows_paths(self) -> bool:
        return self._vm.config.profile.name == "windows"

    async def _transport(self, feature: str) -> Transport:
        if not self._uses_agent:
            return SSHTransport(await self._reach())
        from smolvm_async.controls.agent.execution import AgentTransport, find_system

        session = await self._session(feature)
        return AgentTransport(session, find_system(self._vm.config.profile.name))

    async def _files(self, feature: str) -> AbstractAsyncContextManager[GuestFiles]:
        if self._uses_agent:
            return nullcontext(await self._agent_files(feature))
        return SFTPFiles.opened(await self._reach())

    async def _agent_files(self, feature: str) -> AgentFiles:
        from smolvm_async.controls.agent.transfer import agent_files

        return agent_files(await self._session(feature), self._vm.config.profile.name)

    async def _agent(self, feature: str) -> GuestAgent | None:
        return (await self._session(feature)).agent if self._uses_agent else None

    async def _file_access(self, feature: str) -> FileAccess:
        if self._uses_agent:
            from smolvm_async.controls.agent.contents import AgentAccess

            return AgentAccess(await self._agent_files(feature))
        from smolvm_async.controls.ssh.contents import SFTPAccess

        return SFTPAccess(await self._reach())

    def _require(self, feature: str) -> None:
        self._vm.config.profile.require(feature)
        running(self._vm)
