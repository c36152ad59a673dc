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

import os
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path

from smolvm_async.config.internet import InternetSettings
from smolvm_async.config.options import new_vm_id
from smolvm_async.config.source import Source
from smolvm_async.config.vm_config import Limits
from smolvm_async.errors import (
    SmolVMError,
    SnapshotError,
    SnapshotNotFoundError,
)
from smolvm_async.foundation.files import make_private
from smolvm_async.foundation.locking import LockFile
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.foundation.progress import Progress, ProgressCallback, report
from smolvm_async.foundation.tasks import Shared, in_background, in_thread
from smolvm_async.host.processor import describe_processor
from smolvm_async.images.build.workshop import key_of
from smolvm_async.qemu.arguments import Descriptors, DirectBoot, MachineSpec, qemu_arguments
from smolvm_async.state.directory import check_data_dir
from smolvm_async.state.registry import prune_vms
from smolvm_async.state.snapshots import (
    Snapshot,
    delete_snapshot,
    held_snapshot,
    new_snapshot,
)
from smolvm_async.vm.owner import OwnedVM
from smolvm_async.vm.plan import Plan, find_source
from smolvm_async.vm.prepare import check_layers

logger = get_logger(__name__)

MOST = 12  # snapshots
TRIES = 3  # a snapshot may be removed just after it was made
# Increase this if a change that the hash does not cover changes how the guest gets ready.
RECIPE = 1
TEMPLATE = "vm-template"  # the id in the hashed command line
TEMPLATE_ARGUMENT = "smolvm.template"  # of the kernel; `guest/init.sh` of the image reads it
PAUSE = 600.0  # seconds in which a process does not try again, since each try boots a guest
NOT_WARM = (
    "the guest boots, since no snapshot of a ready guest could be made: %s In the next 10 minutes, "
    "such guests of this process boot without another try."
)

_makings: Shared[None] = Shared()
_pauses: dict[Path, float] = {}  # the end of the pause, for each snapshot that could not be made


@asynccontextmanager
async def ready_guest(plan: Plan) -> AsyncIterator[Snapshot | None]:
    """Hold the snapshot to start from during the block; `None` if the guest must boot.

    The first call for a size makes the snapshot, which takes a second longer than a boot.
    """
    async with AsyncExitStack() as stack:
        try:
            held = await _hold(plan, stack)
        except (SmolVMError, OSError) as error:
            logger.warning(NOT_WARM, f"{error}".rstrip(".") + ".")
            held = None
        yield held


async def _hold(plan: Plan, stack: AsyncExitStack) -> Snapshot | None:
    with ExitStack() as files:
        source = await find_source(plan, files)
    path = cache_root() / await in_thread(_name, plan, source)
    if time.monotonic() < _pauses.get(path, 0.0):
        return None
    try:
        return await _find_or_make(plan._replace(source=source), path, stack)
    except (SmolVMError, OSError):
        _pauses[path] = time.monotonic() + PAUSE
        raise


async def _find_or_make(plan: Plan, path: Path, stack: AsyncExitStack) -> Snapshot:
    root, name = path.parent, path.name

    async def make(on_progress: ProgressCallback) -> None:
        await _make(plan._replace(on_progress=on_progress), root, name)

    for _ in range(TRIES):
        try:
            held = await stack.enter_async_context(held_snapshot(root, name))
            await in_background(check_layers, held)
        except SnapshotNotFoundError:
            await _makings.join(path, make, plan.on_progress)
        except SnapshotError as error:
            logger.warning("%s The snapshot is made anew.", error)
            await delete_snapshot(root, name)
        else:
            with suppress(OSError):
                os.utime(held.path)  # the time of the last use
            return held
    raise SnapshotError(f"{str(path)!r} is not a snapshot that can be used. Remove it.")


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
    argv = qemu_arguments(spec, Descriptors(0, 0, 0, 0), ())
    processor = describe_processor(config.profile.cpu[plan.accelerator.name], "")
    return f"ready-{key_of(RECIPE, files, argv, processor)}"


async def _make(plan: Plan, root: Path, name: str) -> None:
    await in_background(make_private, root)
    await in_thread(check_data_dir, root)  # before the boot, which would be in vain
    lock_file = root / f"{name}.lock"
    if lock_file.exists():
        message = "waiting for the process that makes the snapshot of a ready guest"
        report(plan.on_progress, Progress("snapshot", message, 0.0))
    async with LockFile(lock_file).hold():
        if (root / name).exists():  # another process has made it
            return
        templates = root / "templates"
        await prune_vms(templates)  # of processes that were killed
        vm = _template(plan, templates)
        report(plan.on_progress, Progress("snapshot", "booting a guest for the snapshot", 0.0))
        try:
            await vm.start()
            assert vm.run is not None
            assert vm.run.parked is not None
            problem = await vm.run.parked.wait_parked(plan.config.timeouts.boot)
            if problem:
                raise vm.run.failure or SnapshotError(f"The guest was not ready: {problem}.")
            async with new_snapshot(root, name) as new:
                record = await vm.save(new, {})
                machine = record.machine._replace(source=plan.source)  # without TEMPLATE_ARGUMENT
                update = {"machine": machine, "ready": True}
                await in_background(new.finish, record.model_copy(update=update))
        finally:
            await vm.delete()
        await _limit(root)


def _template(plan: Plan, data_dir: Path) -> OwnedVM:
    """Return a VM of the same size, with nothing of the caller's own.

    Its SSH server waits for the host key, which each clone gets from the parked process.
    """
    own = {
        "vm_id": f"ready-{new_vm_id()}",  # in messages, whose reader does not know this VM
        "data_dir": data_dir,
        "boot": "cold",
        "env": {},
        "port_forwards": (),
        "keep": False,
        "mounts": (),
        "vnc": None,
        "limits": Limits(),
        "internet_settings": InternetSettings(mode="off"),  # each clone has its own
    }
    config = plan.config.model_copy(update=own)
    assert plan.source is not None
    source = plan.source._replace(boot_args=f"{plan.source.boot_args} {TEMPLATE_ARGUMENT}")
    own_plan = plan._replace(config=config, source=source, prefix=(), on_progress=None)
    return OwnedVM(config, own_plan)


async def _limit(root: Path) -> None:
    """Remove the least recently used snapshots above the limit."""
    found = await in_background(_by_use, root)
    await _delete(found[:-MOST])


async def prune_ready_guests() -> int:
    """Remove all snapshots of ready guests, and return their number. VMs that run go on."""
    root = cache_root()
    found = await in_background(_by_use, root)
    await _delete(found)
    await prune_vms(root / "templates")
    return len(found)


async def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(SnapshotNotFoundError):  # another process has deleted it
            await delete_snapshot(path.parent, path.name)


def _by_use(root: Path) -> list[Path]:
    """Return the snapshots, the least recently used first."""
    return sorted(
        (path for path in root.glob("ready-*") if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
    )
