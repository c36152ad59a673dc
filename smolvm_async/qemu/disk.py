"""The disk of a running VM: layers of qcow2 files above the base image.

The guest writes to the top layer. A snapshot freezes the top layer: from then on the guest writes
to a new, empty layer above, and nobody ever changes the frozen layer, so any number of VMs and
snapshots share it by hard links. A read looks through the layers from the top down, and each layer
takes a descriptor. So a disk of many layers is flattened: QEMU copies what the layers contain into
the top layer while the guest runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from smolvm_async.errors import MonitorError, SmolVMError
from smolvm_async.foundation.tasks import settle
from smolvm_async.qemu.arguments import layer_options, node_of
from smolvm_async.qemu.monitor import Monitor
from smolvm_async.state.record import MAX_LAYERS

# QEMU has no limit, but each layer makes a first read of a cluster slower. A disk at rest, which
# QEMU cannot flatten, gets twice as many layers, and a record may have four times as many.
MOST = MAX_LAYERS // 4
JOB = "flatten"
LOOK = 0.02  # seconds between two looks at the job


class Disk:
    """The layers of one VM's disk.

    Attributes:
        layers: The files in the VM's directory, the one that the guest writes to last.

    Args:
        directory: The VM's directory, in which QEMU runs.
        keep: Whether the VM is kept.
    """

    def __init__(
        self, monitor: Monitor, directory: Path, layers: tuple[str, ...], *, keep: bool
    ) -> None:
        self.layers = layers
        self._monitor = monitor
        self._directory = directory
        self._keep = keep

    async def add(self, layer: str) -> None:
        """Open a new layer, an empty qcow2 in the VM's directory. The guest does not use it yet."""
        await self._monitor.execute("blockdev-add", layer_options(layer, None, keep=self._keep))

    async def freeze(self, layer: str, record: Callable[[], Awaitable[None]]) -> None:
        """Freeze the top layer: the guest writes to `layer` from now on.

        Args:
            record: Writes `layers` down. This happens before the guest uses the new layer: a disk
                is the same with one more empty layer, but not without a layer that was written to.
        """
        before, nodes = self.layers, {"node": node_of(self.layers[-1]), "overlay": node_of(layer)}
        self.layers = (*before, layer)
        try:
            await record()
            await self._monitor.execute("blockdev-snapshot", nodes)
        except (MonitorError, OSError) as error:
            if not isinstance(error, MonitorError) or error.error_class:  # else it did not answer
                self.layers = before
                await record()
            raise

    async def drop(self, layer: str) -> None:
        """Close and remove a new layer that the guest does not use after all."""
        if layer not in self.layers:
            with suppress(SmolVMError):  # it was not opened, or QEMU has ended
                await self._monitor.execute("blockdev-del", {"node-name": node_of(layer)})
            with suppress(FileNotFoundError):
                os.unlink(self._directory / layer)

    async def flatten(self) -> None:
        """Copy all layers into the top layer while the guest runs; then call `close_unused()`.

        If the VM ends or the caller is cancelled meanwhile, the disk is as it was.
        """
        top = self.layers[-1]
        # QEMU writes the name of the backing file into the layer. A layer has no such name.
        values = {"job-id": JOB, "device": node_of(top), "base-node": "base", "backing-file": ""}
        try:
            await self._monitor.execute("block-stream", {**values, "auto-dismiss": False})
            await self._concluded()
        finally:
            job = await settle(self._end())
        if problem := job.get("error"):
            raise MonitorError(
                f"QEMU could not flatten the disk: {problem}", command="block-stream"
            )

    async def close_unused(self) -> tuple[str, ...]:
        """Close all layers but the top one, and return their files, for the caller to remove."""
        *below, top = self.layers
        self.layers = (top,)
        for layer in reversed(below):
            await self._monitor.execute("blockdev-del", {"node-name": node_of(layer)})
        return tuple(below)

    async def _end(self) -> dict[str, Any]:
        """End the job, if it has begun and still runs, and return its last state."""
        with suppress(MonitorError):  # it has concluded
            await self._monitor.execute("job-cancel", {"id": JOB})
        if job := await self._concluded():
            await self._monitor.execute("job-dismiss", {"id": JOB})
        return job

    async def _concluded(self) -> dict[str, Any]:
        """Wait for the end of the job, and return its state; empty if there is no job."""
        while True:
            jobs = await self._monitor.execute("query-jobs")
            job: dict[str, Any] = next((job for job in jobs if job["id"] == JOB), {})
            if not job or job["status"] == "concluded":
                return job
            await asyncio.sleep(LOOK)
