"""Take a snapshot of a VM: of its running machine, or of its files at rest.

`qemu/saving.py` explains how a running machine is saved. This module says which files a snapshot
has, and in which order they are written. Whatever fails, is cancelled or killed: before
`NewSnapshot.finish()` there is no snapshot, and the VM goes on as it was. The only trace is a layer
more in the VM's disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import SnapshotError
from smolvm_async.foundation.entries import copy_content
from smolvm_async.foundation.fork import private
from smolvm_async.foundation.progress import Meter
from smolvm_async.foundation.tasks import in_background, in_thread, settle
from smolvm_async.host.processor import describe_processor
from smolvm_async.host.qemu_version import qemu_version
from smolvm_async.images import qcow2
from smolvm_async.qemu.arguments import MachineSpec, RAMFile
from smolvm_async.qemu.disk import MOST, Disk
from smolvm_async.qemu.monitor import Monitor
from smolvm_async.qemu.saving import Twin, activate, open_new, send
from smolvm_async.qemu.sidecars import directories
from smolvm_async.state.directory import VMDirectory
from smolvm_async.state.names import VARS, next_layer
from smolvm_async.state.record import Machine
from smolvm_async.state.snapshot_record import COPIED, MACHINE, RAM, SnapshotRecord
from smolvm_async.state.snapshots import NewSnapshot
from smolvm_async.vm.plan import Plan
from smolvm_async.vm.prepare import PreparedVM, open_boot_files

MIB = 1 << 20
BASE, DISK = "base.qcow2", "twin.qcow2"  # the twin's empty disk; the snapshot does not keep it


class RunningMachine(NamedTuple):
    """What a snapshot needs of a run.

    Attributes:
        ram: The descriptor of the file with the RAM, if it is a shared file.
        record_layers: Writes the layers into the record of a kept VM. Call it before the guest
            writes to a new layer, and before a file of an old layer is removed.
        read_machine: Returns the facts about the machine.
    """

    plan: Plan
    prepared: PreparedVM
    directory: VMDirectory
    monitor: Monitor
    disk: Disk
    ram: int | None
    ready: bool
    record_layers: Callable[[], Awaitable[None]]
    read_machine: Callable[[], Awaitable[Machine]]


async def save_running(
    vm: RunningMachine, new: NewSnapshot, labels: Mapping[str, str]
) -> SnapshotRecord:
    """Fill a new snapshot with the running machine of a VM, and return the record to finish with.

    Raises:
        MonitorError, LaunchError: QEMU could not save the machine.
        SnapshotError: A file that the twin needs is missing.
        VMNotRunningError: The VM has ended.
        OSError: A file could not be written, as on a full disk.
    """
    meter = Meter(vm.plan.on_progress, "snapshot")
    if len(vm.disk.layers) >= MOST:
        meter.report("flattening the disk")
        await activate(vm.monitor)
        await _flatten(vm)
    meter.report("saving memory and devices")
    frozen = vm.disk.layers
    layer = next_layer(frozen)
    with ExitStack() as files:
        ram, state = await in_background(_open_files, vm, new, files)
        try:
            await vm.directory.write_layer(layer, qcow2.empty(vm.prepared.image.virtual_size))
            await vm.disk.add(layer)

            async def freeze() -> None:
                await vm.disk.freeze(layer, vm.record_layers)
                await in_thread(_copy_variables, vm.directory, new)
                if vm.ram is not None:
                    await in_background(copy_content, vm.ram, ram, vm.plan.config.memory * MIB)

            if vm.ram is not None:
                await send(vm.monitor, state, freeze, live=False, shared=True)
            else:
                await _send_to_twin(vm, new, ram, state, freeze)
        finally:
            await settle(vm.disk.drop(layer))
    await in_background(_link, vm, new, frozen)
    meter.report("memory and devices are saved")
    machine = (await vm.read_machine())._replace(layers=frozen)
    return await _record(vm.plan, machine, labels, live=True, ready=vm.ready)


def _open_files(vm: RunningMachine, new: NewSnapshot, files: ExitStack) -> tuple[int, int]:
    """Create the files for the RAM and the devices, and copy the small files of the VM."""
    ram = open_new(new.path / RAM, vm.plan.config.memory * MIB)
    files.callback(os.close, ram)
    state = open_new(new.path / MACHINE)
    files.callback(os.close, state)
    _copy(vm.directory, new)
    return ram, state


async def _send_to_twin(
    vm: RunningMachine,
    new: NewSnapshot,
    ram: int,
    state: int,
    freeze: Callable[[], Awaitable[None]],
) -> None:
    with ExitStack() as files:
        spec = await _twin(vm, new, ram, files)
        async with Twin(spec, new.path, vm.plan.config.timeouts.launch) as twin:
            live = vm.plan.accelerator.name == "kvm"
            with await twin.receive() as channel:
                await send(vm.monitor, channel.fileno(), freeze, live=live, shared=False)
            await twin.save(state)


async def _twin(vm: RunningMachine, new: NewSnapshot, ram: int, files: ExitStack) -> MachineSpec:
    """Return the twin's machine.

    The twin has the same devices, and files of the same sizes where QEMU reads them at its start,
    but an empty disk: nothing ever reads it.
    """
    plan, prepared = vm.plan, vm.prepared
    disk = qcow2.empty(prepared.image.virtual_size)

    def make_files() -> int:
        for name in (BASE, DISK):
            (new.path / name).write_bytes(disk)
        base = private(os.open(new.path / BASE, os.O_RDONLY | os.O_CLOEXEC))
        files.callback(os.close, base)
        for name in directories(plan.config.profile):
            (new.path / name).mkdir(0o700)
        return base

    machine = await vm.read_machine()
    return MachineSpec(
        plan.config,
        prepared.tools,
        plan.accelerator,
        await in_background(make_files),
        plan.config.profile.sidecars,
        machine_type=machine.type,
        identity=machine.identity,
        direct_boot=await open_boot_files(files, prepared.source),
        layers=(DISK,),
        ram=RAMFile(ram, shared=True),
        incoming=True,
    )


def _copy_variables(directory: VMDirectory, new: NewSnapshot) -> None:
    """Copy the UEFI variables again, now that they do not change."""
    if (new.path / VARS).exists():
        os.unlink(VARS, dir_fd=new.fd)  # the twin has another file open
        new.copy(directory.fd, VARS)


def _link(vm: RunningMachine, new: NewSnapshot, layers: tuple[str, ...]) -> None:
    for layer in layers:
        new.link(vm.directory.fd, layer)


async def _record(
    plan: Plan, machine: Machine, labels: Mapping[str, str], *, live: bool, ready: bool
) -> SnapshotRecord:
    version = await qemu_version(plan.tools.qemu)
    processor = describe_processor(plan.config.profile.cpu[plan.accelerator.name], version)
    make = partial(  # the first one builds its validator, which takes some milliseconds
        SnapshotRecord,
        config=plan.config.model_copy(update={"mounts": ()}),  # a clone has its own
        machine=machine,
        created=time.time_ns(),
        live=live,
        ready=ready,
        accelerator=plan.accelerator.name,
        qemu=version,
        processor=processor,
        labels=dict(labels),
    )
    return await in_thread(make)


async def _flatten(vm: RunningMachine) -> None:
    """Make one layer of all, and remove the files of the others."""
    await vm.disk.flatten()
    await settle(_remove_unused(vm))


async def _remove_unused(vm: RunningMachine) -> None:
    unused = await vm.disk.close_unused()
    await vm.record_layers()
    await in_thread(_remove, vm.directory.path, unused)


def _remove(directory: Path, layers: tuple[str, ...]) -> None:
    for layer in layers:
        (directory / layer).unlink(missing_ok=True)


async def save_at_rest(
    plan: Plan, directory: VMDirectory, new: NewSnapshot, labels: Mapping[str, str]
) -> SnapshotRecord:
    """Fill a new snapshot with the files of a kept VM that is at rest; its directory is locked.

    The VM gets a new layer, since the snapshot shares the layers that it has until now.
    """
    record = directory.record
    assert record is not None, "it has run"
    assert record.machine is not None, "it has run"
    frozen = record.machine.layers
    if len(frozen) >= 2 * MOST:
        raise SnapshotError(
            f"{plan.config.vm_id} has {len(frozen)} layers of snapshots, and only a running VM can "
            "flatten them: start() the VM, and take the snapshot then."
        )
    layer = next_layer(frozen)
    size = await in_thread(_virtual_size, directory.path / frozen[-1])
    await directory.write_layer(layer, qcow2.empty(size))
    machine = record.machine._replace(layers=(*frozen, layer))
    await in_thread(directory.write, record.model_copy(update={"machine": machine}))
    await in_background(_link_and_copy, plan.config, directory, new, frozen)
    return await _record(plan, record.machine, labels, live=False, ready=False)


def _virtual_size(layer: Path) -> int:
    with layer.open("rb") as file:
        return qcow2.check(file.fileno()).virtual_size


def _link_and_copy(
    config: VMConfig, directory: VMDirectory, new: NewSnapshot, frozen: tuple[str, ...]
) -> None:
    _copy(directory, new)
    for name in (*directories(config.profile), *frozen):
        new.copy(directory.fd, name)


def _copy(directory: VMDirectory, new: NewSnapshot) -> None:
    """Copy the files that the VM's guest or its login needs."""
    for name in COPIED:
        if (directory.path / name).exists():
            new.copy(directory.fd, name)
