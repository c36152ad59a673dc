"""Check whether this host's QEMU can load a saved machine, before anything is created."""

from __future__ import annotations

from smolvm_async.errors import SnapshotError
from smolvm_async.host.processor import describe_processor
from smolvm_async.host.qemu_version import knows_machine, qemu_version, version_key
from smolvm_async.state.snapshots import Snapshot
from smolvm_async.vm.plan import Plan

BOOT = "Start it where it was taken, or boot a VM from the same image instead."


async def check_loadable(snapshot: Snapshot, plan: Plan) -> None:
    """Check that the accelerator, QEMU and the processor fit to the snapshot of a running VM.

    QEMU loads what an earlier version has saved, for as long as it knows the machine type. It does
    not load what a later version has saved. A guest must not lose features of its processor.

    Raises:
        SnapshotError: They do not fit; the message has the reason.
    """
    record = snapshot.record
    if not record.live:
        return
    version = await qemu_version(plan.tools.qemu)
    processor = describe_processor(plan.config.profile.cpu[plan.accelerator.name], version)
    reason = ""
    if record.accelerator != plan.accelerator.name:
        reason = (
            f"its guest ran under {record.accelerator.upper()}, and this VM would run under "
            f"{plan.accelerator.name.upper()}"
        )
    elif version_key(record.qemu) > version_key(version):
        reason = f"QEMU {record.qemu} has saved it, and this host's QEMU {version} is older"
    elif record.processor != processor:
        reason = f"its guest has the processor {record.processor}, and this VM has {processor}"
    elif version != record.qemu and not await knows_machine(plan.tools.qemu, record.machine.type):
        reason = f"this host's QEMU {version} does not know its machine type {record.machine.type}"
    if reason:
        name = snapshot.path.name
        raise SnapshotError(f"Snapshot {name!r} cannot be loaded here: {reason}.", hint=BOOT)
