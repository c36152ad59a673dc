"""The channels to a guest, for commands and files. Each channel is a row of `CHANNELS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol

from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.commands.transport import Transport
from smolvm_async.controls.contents import FileAccess
from smolvm_async.controls.files.transport import GuestFiles
from smolvm_async.controls.interface import Run
from smolvm_async.controls.ssh.clock import advance_clock
from smolvm_async.controls.ssh.execution import SSHTransport
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.transfer import SFTPFiles
from smolvm_async.guests import Channel, GuestProfile
from smolvm_async.qemu.guest_agent import GuestAgent

if TYPE_CHECKING:  # few guests need it
    from smolvm_async.controls.agent.transfer import AgentFiles


class GuestChannel(Protocol):
    """A channel to the guest of one run. The guest may not be ready yet."""

    @property
    def agent(self) -> GuestAgent | None:
        """The guest's agent, if the channel leads to the agent."""

    async def probe(self) -> str | None:
        """Return the evidence that the guest answers; `None` if it does not answer yet."""

    async def missing(self) -> bool:
        """Return whether the image certainly lacks the program at the guest's end."""

    def transport(self) -> Transport:
        """Return the way to run commands."""

    def files(self) -> AbstractAsyncContextManager[GuestFiles]:
        """Return the way to copy files, for one transfer."""

    def access(self) -> FileAccess:
        """Return the way to files as bytes."""

    async def advance_clock(self) -> str:
        """Set the guest's clock to the host's; return the reason if this failed."""


class SSHChannel(NamedTuple):
    """The channel to the guest's SSH server."""

    link: Link
    windows: bool

    @property
    def agent(self) -> None:
        """See `GuestChannel.agent`."""

    async def probe(self) -> str | None:
        """See `GuestChannel.probe()`."""
        answered = await self.link.connect()
        return "the guest's SSH server accepted the login" if answered else None

    async def missing(self) -> bool:
        """See `GuestChannel.missing()`: a server may start at any time."""
        return False

    def transport(self) -> Transport:
        """See `GuestChannel.transport()`."""
        return SSHTransport(self.link, self.windows)

    def files(self) -> AbstractAsyncContextManager[GuestFiles]:
        """See `GuestChannel.files()`."""
        return SFTPFiles.opened(self.link, windows=self.windows)

    def access(self) -> FileAccess:
        """See `GuestChannel.access()`."""
        from smolvm_async.controls.ssh.contents import SFTPAccess

        return SFTPAccess(self.link, windows=self.windows)

    async def advance_clock(self) -> str:
        """See `GuestChannel.advance_clock()`."""
        return await advance_clock(self.link, windows=self.windows)


class AgentChannel(NamedTuple):
    """The channel to the QEMU guest agent of a guest with this OS."""

    session: Session
    os: str

    @property
    def agent(self) -> GuestAgent:
        """See `GuestChannel.agent`."""
        return self.session.agent

    async def probe(self) -> str | None:
        """See `GuestChannel.probe()`."""
        return await self.agent.probe()

    async def missing(self) -> bool:
        """See `GuestChannel.missing()`."""
        return not await self.agent.present()

    def transport(self) -> Transport:
        """See `GuestChannel.transport()`."""
        from smolvm_async.controls.agent.execution import AgentTransport, find_system

        return AgentTransport(self.session, find_system(self.os))

    def files(self) -> AbstractAsyncContextManager[GuestFiles]:
        """See `GuestChannel.files()`."""
        return nullcontext(self._files())

    def access(self) -> FileAccess:
        """See `GuestChannel.access()`."""
        from smolvm_async.controls.agent.contents import AgentAccess

        return AgentAccess(self._files())

    def _files(self) -> AgentFiles:
        from smolvm_async.controls.agent.transfer import agent_files

        return agent_files(self.session, self.os)

    async def advance_clock(self) -> str:
        """See `GuestChannel.advance_clock()`."""
        from smolvm_async.controls.agent import clock

        return "" if await self.missing() else await clock.advance_clock(self.agent)


CHANNELS: Mapping[Channel, Callable[[Run, GuestProfile], GuestChannel]] = {
    "ssh": lambda run, profile: SSHChannel(run.link, profile.name == "windows"),
    "agent": lambda run, profile: AgentChannel(run.session, profile.name),
}


def channel_to(run: Run, profile: GuestProfile) -> GuestChannel:
    """Return the channel that the library uses to this guest."""
    return CHANNELS[profile.channels[0]](run, profile)
