"""The cache of ready guests: the built-in Debian starts from a snapshot, and does not boot.

The first start of a size boots a VM of the library's own until it is ready, takes a snapshot, and
deletes the VM. This start, and all later ones, are clones of the snapshot. The name of a snapshot
is a hash of everything that its guest depends on: the image, the program QEMU, and QEMU's command
line, which has memory, cores and resolution. So a snapshot is never used after one of them has
changed. Under KVM, the host's processor is also a part.

::

    CACHE/warm/
        ready-KEY/       a snapshot, see `state/snapshots.py`
        ready-KEY.lock   a process makes the snapshot, and others wait
        templates/       the data directory of the VMs that become snapshots

A snapshot takes some 120 MB. `MOST` of them are kept; the least recently used ones go first. A VM
that has started from a snapshot does not need it any more.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from smolvm_async.config.options import new_vm_id
from smolvm_async.config.source import Source
from smolvm_async.config.vm_config import Limits
from smolvm_async.controls.interface import begun
from smolvm_async.errors import (
    SmolVMError,
    SnapshotError,
    SnapshotNotFoundError,
    VMTimeoutError,
)
from smolvm_async.foundation.files import make_private
from smolvm_async.foundation.locking import LockFile
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.foundation.progress import Progress, ProgressCallback, report
from smolvm_async.foundation.tasks import Shared, end_tasks, has_result, in_background, in_thread
from smolvm_async.host.processor import describe_processor
from smolvm_async.images.build.workshop import key_of
from smolvm_async.qemu.arguments import Descriptors, DirectBoot, MachineSpec, qemu_arguments
from smolvm_async.qemu.events import BootState
from smolvm_async.state.registry import prune_vms
from smolvm_async.state.snapshots import (
    Snapshot,
    delete_snapshot,
    held_snapshot,
    new_snapshot,
)
from smolvm_async.vm.owner import OwnedVM
from smolvm_async.vm.plan import Plan, find_source

logger = get_logger(__name__)

MOST = 12  # snapshots
TRIES = 3  # a snapshot may be removed just after it was made
# Increase this if a change that the hash does not cover changes how the guest gets ready.
RECIPE = 1
TEMPLATE = "vm-template"  # the id in the hashed command line
NOT_WARM = "the guest boots, since no snapshot of a ready guest could be made: %s"

_makings: Shared[None] = Shared()


@asynccontextmanager
async def ready_guest(plan: Plan) -> AsyncIterator[Snapshot | None]:
    """Hold the snapshot to start from during the block; `None` if the guest must boot.

    The first call for a size makes the snapshot, which takes a second longer than a boot.
    """
    async with AsyncExitStack() as stack:
        try:
            held = await _hold(plan, stack)
        except (SmolVMError, OSError) as error:
            logger.warning(NOT_WARM, error)
            held = None
        yield held


async def _hold(plan: Plan, stack: AsyncExitStack) -> Snapshot | None:
    with ExitStack() as files:
        source = await find_source(plan, files)
    root, name = cache_root(), await in_thread(_name, plan, source)

    async def make(on_progress: ProgressCallback) -> None:
        await _make(plan._replace(source=source, on_progress=on_progress), root, name)

    for _ in range(TRIES):
        try:
            held = await stack.enter_async_context(held_snapshot(root, name))
        except SnapshotNotFoundError:
            await _makings.join(root / name, make, plan.on_progress)
        except SnapshotError as error:
            logger.warning("%s The snapshot is made anew.", error)
            await delete_snapshot(root, name)
        else:
            with suppress(OSError):
                os.utime(held.path)  # the time of the last use
            return held
    return None


def cache_root() -> Path:
    """Return the directory of the snapshots."""
    return xdg_home("XDG_CACHE_HOME", ".cache") / "smolvm-async" / "warm"


def _name(plan: Plan, source: Source) -> str:
    """Return the name of the snapshot: a hash of everything that it depends on."""
    image, program = source.image.stat(), plan.tools.qemu.stat()
    files = [
        (str(source.image), image.st_size, image.st_mtime_ns),
        (str(plan.tools.qemu), program.st_size, program.st_mtime_ns),
    ]
    boot = DirectBoot(0, 0, source.boot_args)
    config = plan.config.model_copy(update={"vm_id": TEMPLATE, "keep": False})
    spec = MachineSpec(config, plan.tools, plan.accelerator, 0, (), direct_boot=boot)
    argv = qemu_arguments(spec, Descriptors(0, 0, 0), ())
    processor = describe_processor(config.profile.cpu[plan.accelerator.name], "")
    return f"ready-{key_of(RECIPE, files, argv, processor)}"


async def _make(plan: Plan, root: Path, name: str) -> None:
    await in_background(make_private, root)
    lock = LockFile(root / f"{name}.lock")
    report(plan.on_progress, Progress("boot", "waiting for another process's snapshot", 0.0))
    async with lock.hold():
        if (root / name).exists():  # another process has made it
            return
        templates = root / "templates"
        await prune_vms(templates)  # of processes that were killed
        vm = _template(plan, templates)
        report(plan.on_progress, Progress("boot", "booting a guest for the snapshot", 0.0))
        try:
            await vm.start()
            await _until_ready(vm, plan.config.timeouts.boot)
            async with new_snapshot(root, name) as new:
                await in_background(new.finish, await vm.save(new, {}))
        finally:
            await vm.delete()
        await _limit(root)


def _template(plan: Plan, data_dir: Path) -> OwnedVM:
    """Return a VM of the same size, with nothing of the caller's own."""
    own = {
        "vm_id": new_vm_id(),
        "data_dir": data_dir,
        "boot": "cold",
        "env": {},
        "port_forwards": (),
        "keep": False,
        "vnc": None,
        "limits": Limits(),
    }
    config = plan.config.model_copy(update=own)
    return OwnedVM(config, plan._replace(config=config, prefix=(), on_progress=None))


async def _until_ready(vm: OwnedVM, timeout: float) -> None:
    run, over = begun(vm)
    waiting = asyncio.ensure_future(run.boot.wait_for(BootState.READY))
    ends: set[asyncio.Future[Any]] = {waiting, over}
    try:
        await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not has_result(waiting):
            raise run.failure or VMTimeoutError(f"the guest was not ready within {timeout:g} s")
    finally:
        await end_tasks(waiting)


async def _limit(root: Path) -> None:
    """Remove the least recently used snapshots above the limit."""
    found = await in_background(_by_use, root)
    for path in found[:-MOST]:
        with suppress(SnapshotNotFoundError):
            await delete_snapshot(root, path.name)


async def prune_ready_guests() -> int:
    """Remove all snapshots of ready guests, and return their number. VMs that run go on."""
    root = cache_root()
    found = await in_background(_by_use, root)
    for path in found:
        with suppress(SnapshotNotFoundError):
            await delete_snapshot(root, path.name)
    await prune_vms(root / "templates")
    return len(found)


def _by_use(root: Path) -> list[Path]:
    """Return the snapshots, the least recently used first."""
    return sorted(
        (path for path in root.glob("ready-*") if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
    )
