"""The host directories of one run: plugged in, mounted in the guest, and out of a snapshot's way.

QEMU refuses to save a machine that has a directory mounted. So a snapshot unmounts the directories
and unplugs their devices, and mounts them again at its end, whatever happens. A clone thus has
nothing of its source's directories, and plugs in its own.

Most runs have no directories, so the functions import what only the others need.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.controls.ssh.link import Link
from smolvm_async.errors import SnapshotError
from smolvm_async.foundation.tasks import settle
from smolvm_async.qemu.monitor import Monitor

if TYPE_CHECKING:
    from smolvm_async.config.mounts import Mount


class Mounting:
    """The directories of one run; for a VM without any, nothing is done.

    Attributes:
        mounts: The directories, in the order of their devices.
    """

    def __init__(self, config: VMConfig, monitor: Monitor, link: Link) -> None:
        self._vm_id = config.vm_id
        self.mounts: tuple[Mount, ...] = ()
        if config.mounts:
            from smolvm_async.config.mounts import check_mounts

            self.mounts = check_mounts(config.mounts)
        self._monitor = monitor
        self._link = link

    async def plug(self) -> None:
        """Plug the devices in, unless they are."""
        if self.mounts:
            from smolvm_async.qemu.mounts import plug

            await plug(self._monitor, len(self.mounts))

    async def mount(self) -> None:
        """Mount the directories in a guest that has just become ready."""
        if self.mounts:
            from smolvm_async.controls.ssh.mounts import mount

            await mount(self._link, self.mounts)

    @asynccontextmanager
    async def released(self, possible: bool) -> AsyncIterator[None]:
        """Unmount the directories for the time of the block.

        Args:
            possible: Whether the guest runs and is ready.

        Raises:
            SnapshotError: The guest does not run, or is not ready.
            MountError, MonitorError: The guest still uses a directory.
        """
        if not self.mounts:
            yield
            return
        if not possible:
            raise SnapshotError(
                f"{self._vm_id} cannot be saved: the guest must unmount its mounts= first, and "
                "only a guest that runs and is ready does this.",
                hint="Call resume(), or wait_for('ready'), before snapshot().",
            )
        try:
            await settle(self._release())  # half of it could not be undone
            yield
        finally:
            await settle(self._restore())

    async def _release(self) -> None:
        from smolvm_async.controls.ssh.mounts import unmount
        from smolvm_async.qemu.mounts import unplug

        await unmount(self._link, self.mounts)
        await unplug(self._monitor)

    async def _restore(self) -> None:
        await self.plug()
        await self.mount()
