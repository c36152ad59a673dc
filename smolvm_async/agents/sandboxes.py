"""The sandboxes of an agent's session: made within limits, and all deleted at its end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

from smolvm_async.agents.computer import Computer
from smolvm_async.agents.output import Output
from smolvm_async.config.checks import check_integer, check_life, check_seconds, shown
from smolvm_async.config.options import CloneOptions, VMOptions
from smolvm_async.controls.desktop.picture import Screenshot
from smolvm_async.errors import ConfigError, HostError, SnapshotNotFoundError, VMNotFoundError
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.foundation.tasks import settle
from smolvm_async.guests import BUILT_IN, GUESTS
from smolvm_async.state.status import Status
from smolvm_async.vm.vm import AsyncSmolVM

logger = get_logger(__name__)

# The progress of the current call of a tool: the first sandbox may need minutes to build its image.
on_progress: ContextVar[ProgressCallback | None] = ContextVar("on_progress", default=None)


def _without_network() -> VMOptions:
    return {"internet_settings": {"mode": "off"}}


@dataclass(frozen=True)
class SessionLimits:
    """The limits of a session, which the agent cannot change.

    Attributes:
        max_sandboxes: Sandboxes at the same time.
        max_memory: MiB of all sandboxes together.
        max_snapshots: Snapshots at the same time, each with the memory of a sandbox on the disk.
        lifetime: Seconds after which a sandbox is deleted.
        command_time: Seconds that a command may take at most.
        images: The image of each guest OS that the agent may use, besides the built-in Linux.
        snapshots: Snapshots of the user that the agent may start, but not delete.
        options: Arguments of every `AsyncSmolVM`: the network policy, the accelerator, ...
        account: Arguments of the sandboxes from a Windows image that has OpenSSH: `user`,
            `password`, `key`.
    """

    max_sandboxes: int = 8
    max_memory: int = 8192
    max_snapshots: int = 8
    lifetime: float = 3600.0
    command_time: float = 600.0
    images: Mapping[str, str] = field(default_factory=dict)
    snapshots: tuple[str, ...] = ()
    options: VMOptions = field(default_factory=_without_network)
    account: VMOptions = field(default_factory=VMOptions, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_sandboxes", "max_memory"):
            check_integer(name, getattr(self, name), 1, None, "a whole number, 1 or more")
        check_integer("max_snapshots", self.max_snapshots, 0, None, "a whole number, 0 or more")
        check_life("lifetime", self.lifetime)
        check_seconds("command_time", self.command_time)

    @property
    def data_dir(self) -> str | os.PathLike[str] | None:
        """The directory of the VMs and snapshots."""
        return self.options.get("data_dir")

    def clone_options(self) -> CloneOptions:
        """Return the arguments of every clone of a snapshot or of a sandbox."""
        clone: CloneOptions = {"data_dir": self.data_dir, "ttl": self.lifetime}
        clone["internet_settings"] = self.options.get("internet_settings")
        clone["accel"] = self.options.get("accel", "auto")
        clone["on_progress"] = on_progress.get()
        return clone


@dataclass
class Sandbox:
    """A VM of the session.

    Attributes:
        vm: The VM.
        guest: The guest OS.
        memory: The guest's memory in MiB.
        ends: The time at which the sandbox is deleted, of `time.monotonic()`.
        computer: Executes the agent's actions on the screen.
        output: The output of the last command.
        seen: The last picture that the agent got.
    """

    vm: AsyncSmolVM
    guest: str
    memory: int
    ends: float
    computer: Computer
    output: Output = field(default_factory=Output)
    seen: Screenshot | None = None

    @property
    def left(self) -> float:
        """Seconds until the sandbox is deleted."""
        return max(0.0, self.ends - time.monotonic())


class Sandboxes:
    """An async context manager, whose end deletes all sandboxes and snapshots of the session."""

    def __init__(self, limits: SessionLimits) -> None:
        self.limits = limits
        self._live: dict[str, Sandbox] = {}
        self._starting: list[int] = []  # the memory of each sandbox that is being made
        self._snapshots: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.delete_all()

    async def delete_all(self) -> None:
        """Delete all sandboxes and snapshots of the session, except those that are being made."""
        await settle(self._delete_all())

    async def _delete_all(self) -> None:
        deletions = [sandbox.vm.delete() for sandbox in self._live.values()]
        deletions += [self._forget(name) for name in self._snapshots]
        self._live.clear()
        self._snapshots.clear()
        for result in await asyncio.gather(*deletions, return_exceptions=True):
            if isinstance(result, BaseException):
                logger.warning("a sandbox or a snapshot could not be deleted: %s", result)

    async def _forget(self, name: str) -> None:
        with suppress(SnapshotNotFoundError):  # the user has deleted the snapshot
            await AsyncSmolVM.delete_snapshot(name, data_dir=self.limits.data_dir)

    def all(self) -> list[Sandbox]:
        """Return the sandboxes, the oldest first."""
        return [each for each in self._live.values() if each.vm.status is not Status.DELETED]

    def find(self, name: str) -> Sandbox:
        """Return a sandbox of this session.

        Raises:
            VMNotFoundError: No sandbox of this session has this id.
        """
        if name not in self._live:
            raise VMNotFoundError(
                f"this session has no sandbox {shown(name)}: list_sandboxes shows all."
            )
        if self._live[name].vm.status is Status.DELETED:
            raise VMNotFoundError(
                f"sandbox {name} was deleted after its lifetime of {self.limits.lifetime:g} s: "
                "create a new one."
            )
        return self._live[name]

    async def create(self, guest: str, memory: int | None) -> Sandbox:
        """Start a sandbox; `memory` is in MiB."""
        image = self.limits.images.get(guest)
        if image is None and guest not in BUILT_IN:
            known = ", ".join(dict.fromkeys([*BUILT_IN, *self.limits.images]))
            raise ConfigError(f"os={shown(guest)} is not available: this server has {known}.")
        wanted = GUESTS[guest].default_memory if memory is None else memory
        check_integer("memory", wanted, 1, None, "MiB, such as 1024")
        options: dict[str, Any] = {**self.limits.options, "os": guest, "image": image}
        if guest == "windows":
            options |= self.limits.account
        async with self._room([wanted]) as ends:
            options |= {"ttl": self.limits.lifetime, "on_progress": on_progress.get()}
            vm = AsyncSmolVM(**options, memory=wanted)
            try:
                await vm.start()
            except BaseException:
                await settle(vm.delete())
                raise
            return self._add(vm, guest, wanted, ends)

    async def restore(self, name: str) -> Sandbox:
        """Start a sandbox from a snapshot of this session, or of the user."""
        infos = await AsyncSmolVM.snapshots(data_dir=self.limits.data_dir)
        info = next((info for info in infos if info.name == name), None)
        if info is None or name not in self.snapshots:
            raise SnapshotNotFoundError(
                f"there is no snapshot {shown(name)} for this session: list_sandboxes shows all."
            )
        async with self._room([info.memory]) as ends:
            options = self.limits.clone_options()
            if info.os == "windows":
                options["password"] = self.limits.account.get("password")
            vm = await AsyncSmolVM.from_snapshot(name, **options)
            return self._add(vm, info.os, info.memory, ends)

    async def copy(self, source: Sandbox, count: int) -> list[Sandbox]:
        """Start live copies of a sandbox."""
        check_integer("count", count, 1, 1000, "a whole number from 1 to 1000")
        async with self._room([source.memory] * count) as ends:
            vm = source.vm
            clones = await vm.fork(count, **self.limits.clone_options())
            return [self._add(clone, source.guest, source.memory, ends) for clone in clones]

    @property
    def snapshots(self) -> list[str]:
        """The names of the snapshots that `restore()` starts."""
        return [*self.limits.snapshots, *self._snapshots]

    async def snapshot(self, source: Sandbox, name: str) -> None:
        """Save a sandbox until the end of the session."""
        if len(self._snapshots) >= self.limits.max_snapshots:
            raise HostError(
                f"a session may have {self.limits.max_snapshots} snapshots.",
                hint="Delete one with delete_snapshot first.",
                missing=("snapshots",),
            )
        await source.vm.snapshot(name, labels={"made by": "smolvm-async mcp"})
        self._snapshots.append(name)

    async def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot of this session."""
        if name not in self._snapshots:
            raise SnapshotNotFoundError(f"this session has made no snapshot {shown(name)}.")
        self._snapshots.remove(name)
        await settle(self._forget(name))

    async def delete(self, sandbox: Sandbox) -> None:
        """Kill a sandbox and delete its files."""
        self._live.pop(sandbox.vm.vm_id, None)
        await settle(sandbox.vm.delete())

    @asynccontextmanager
    async def _room(self, memory: Sequence[int]) -> AsyncIterator[float]:
        """Take room for new sandboxes with this memory during the block, which starts them.

        Yield the time at which they end, of `time.monotonic()`.

        Raises:
            HostError: They do not fit into the limits.
        """
        limits, taken = self.limits, [sandbox.memory for sandbox in self.all()]
        taken += self._starting
        if len(taken) + len(memory) > limits.max_sandboxes:
            problem = f"this session has {len(taken)} of at most {limits.max_sandboxes} sandboxes"
        elif sum(taken) + sum(memory) > limits.max_memory:
            problem = f"{sum(taken)} of at most {limits.max_memory} MiB of memory are taken"
        else:
            self._starting += memory
            try:
                yield time.monotonic() + limits.lifetime
            finally:
                for amount in memory:
                    self._starting.remove(amount)
            return
        raise HostError(
            f"{problem}, and {len(memory)} more with {sum(memory)} MiB do not fit.",
            hint="Delete a sandbox with delete_sandbox first, or ask for less.",
            missing=("memory",),
        )

    def _add(self, vm: AsyncSmolVM, guest: str, memory: int, ends: float) -> Sandbox:
        sandbox = Sandbox(vm, guest, memory, ends, Computer(vm))
        self._live[vm.vm_id] = sandbox
        return sandbox
