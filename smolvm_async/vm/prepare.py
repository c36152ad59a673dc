"""Prepare a run: open the image, fill the VM's directory, and make or load the SSH keys."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from smolvm_async.config.source import Source
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.controls.ssh.login import ImageLogin, Login, image_login, kept_login, new_login
from smolvm_async.errors import ImageError, VMNotRunningError
from smolvm_async.foundation.locking import try_lock
from smolvm_async.foundation.tasks import in_background, in_thread
from smolvm_async.host.tools import HostTools, find_plain_uefi
from smolvm_async.images import qcow2
from smolvm_async.images.local import (
    BaseImage,
    open_image,
    open_initrd,
    open_kernel,
    starts_by_bios,
)
from smolvm_async.qemu.arguments import DirectBoot
from smolvm_async.qemu.sidecars import directories
from smolvm_async.state.directory import Parts, VMDirectory
from smolvm_async.state.names import OVERLAY, SEED, next_layer
from smolvm_async.state.record import Machine
from smolvm_async.vm.plan import Plan, find_source

if TYPE_CHECKING:  # a boot does not need them
    from smolvm_async.host.shares import Share
    from smolvm_async.qemu.saving import SavedState
    from smolvm_async.state.snapshot_record import SnapshotRecord
    from smolvm_async.state.snapshots import Snapshot


_BootFiles: TypeAlias = "tuple[BaseImage, DirectBoot | None]"


class SavedMachine(NamedTuple):
    """A snapshot of a running machine, to load.

    Attributes:
        record: The snapshot's record.
        ram: The descriptor of the file with the RAM.
        state: The state of all devices.
        login: The login that the guest has until the clone is set right; see `vm/set_right.py`.
    """

    record: SnapshotRecord
    ram: int
    state: SavedState
    login: Login | None


class PreparedVM(NamedTuple):
    """The files and programs that a VM starts from.

    The image, the kernel and the saved machine stay open until QEMU has inherited them.

    Attributes:
        direct_boot: The kernel; `None` if the image has a boot loader.
        login: The login; `None` if the library cannot log in to the guest OS.
        layers: The layers of the disk.
        origin: The machine of the snapshot that the VM starts from, if there is one.
        saved: The machine to load instead of booting.
        shares: The open host directories of the guest.
    """

    source: Source
    image: BaseImage
    tools: HostTools
    direct_boot: DirectBoot | None
    login: Login | ImageLogin | None
    layers: tuple[str, ...]
    origin: Machine | None
    saved: SavedMachine | None
    shares: tuple[Share, ...]


@asynccontextmanager
async def snapshot_to_start(plan: Plan, machine: Machine | None) -> AsyncIterator[Snapshot | None]:
    """Hold the snapshot that the VM starts from, if there is one, during the block."""
    snapshot = plan.snapshot
    if machine is not None:  # a kept VM that has run before
        yield None
    elif snapshot is None and plan.config.boot == "warm":
        from smolvm_async.vm.warm import ready_guest  # a boot does not need it

        async with ready_guest(plan) as ready:
            yield ready
    elif snapshot is None or (not isinstance(snapshot, tuple) and snapshot.fd >= 0):
        yield snapshot
    else:
        from smolvm_async.state.snapshots import NewSnapshot, held_snapshot

        if isinstance(snapshot, NewSnapshot):
            raise VMNotRunningError(
                f"{plan.config.vm_id} is a clone of fork(), which starts only once: call fork() "
                "again."
            )
        if not isinstance(snapshot, tuple):
            snapshot = (snapshot.path.parent, snapshot.path.name)
        async with held_snapshot(*snapshot) as held:
            yield held


async def prepare(
    plan: Plan,
    state: VMDirectory,
    machine: Machine | None,
    snapshot: Snapshot | None,
    stack: ExitStack,
) -> PreparedVM:
    """Find and open the files that the VM starts from, and fill its directory.

    Args:
        machine: The recorded machine of a kept VM that has run before.
        snapshot: The snapshot to start from, if there is one.
        stack: Closes the files.
    """
    if snapshot is not None:
        from smolvm_async.vm.compatibility import check_loadable

        await check_loadable(snapshot, plan)
    origin = _origin(snapshot.record) if snapshot is not None else machine
    source = (origin and origin.source) or await find_source(plan, stack)
    login: Login | ImageLogin | None
    saved: SavedMachine | None = None
    if snapshot is not None:
        # One turn of a thread for all: each turn costs as much as what is done in it.
        (image, direct_boot), layers, login, saved = await in_background(
            _fill_from, snapshot, plan, state, source, stack
        )
    else:
        image, direct_boot = await in_thread(_open_files, source, machine, "VM", stack)
    tools = plan.tools
    if _starts_by_itself(plan, source) and not await _by_bios(plan, source, image):
        tools = tools._replace(firmware=find_plain_uefi())
    if snapshot is None:
        layers = machine.layers if machine is not None else (OVERLAY,)
        login = await _fill(plan.config, state, machine, image, tools)
    if plan.config.profile.login == "image":
        login = await in_thread(image_login, plan.config, state.path)
    shares = await in_thread(_open_shares, plan.config, stack) if plan.config.mounts else ()
    return PreparedVM(source, image, tools, direct_boot, login, layers, origin, saved, shares)


def _open_shares(config: VMConfig, stack: ExitStack) -> tuple[Share, ...]:
    from smolvm_async.config.mounts import check_mounts
    from smolvm_async.host.shares import open_share

    shares = []
    for mount in check_mounts(config.mounts):
        share = open_share(mount, config.data_dir)
        stack.callback(os.close, share.fd)
        shares.append(share)
    return tuple(shares)


def _origin(record: SnapshotRecord) -> Machine:
    """Return the machine of a snapshot, with the identity that its guest has."""
    machine = record.machine
    return machine._replace(identity=machine.identity or record.config.vm_id)


async def look_at_disk(plan: Plan, source: Source) -> bool | None:
    """Return whether the disk has a boot loader for a BIOS; `None` if this does not matter."""
    if not _starts_by_itself(plan, source):
        return None
    with ExitStack() as stack:
        return await _by_bios(plan, source, await in_thread(_open_disk, source, stack))


def _starts_by_itself(plan: Plan, source: Source) -> bool:
    """Return whether the disk decides between BIOS and UEFI."""
    return plan.config.profile.firmware == "image" and source.kernel is None


async def _by_bios(plan: Plan, source: Source, image: BaseImage) -> bool:
    if plan.by_bios is not None:
        return plan.by_bios
    return await starts_by_bios(plan.tools.qemu_img, image.fd, source.format)


def _fill_from(
    snapshot: Snapshot, plan: Plan, state: VMDirectory, source: Source, stack: ExitStack
) -> tuple[_BootFiles, tuple[str, ...], Login | None, SavedMachine | None]:
    """Open the boot files, and fill the directory from a snapshot.

    Return the boot files, the disk's layers, the login and the machine.
    """
    from smolvm_async.qemu.saving import SavedState
    from smolvm_async.state.snapshot_record import MACHINE, RAM

    record, config = snapshot.record, plan.config
    image, direct_boot = _open_files(source, record.machine, "snapshot", stack)
    frozen = record.machine.layers
    layers = (*frozen, next_layer(frozen))
    login = new_login(config) if config.profile.makes_keys else None
    files = login.files(config) if login is not None else {}
    if record.live:  # the guest has read its seed
        files.pop(SEED, None)
    if plan.snapshot is not None:  # `ready_guest()` has checked its own
        check_layers(snapshot)
    snapshot.give(state, but=files)
    # The state of the sidecars of a running machine is in the file `machine`.
    fresh = directories(config.profile) if record.live else ()
    state.fill(qcow2.empty(image.virtual_size), Parts(None, fresh, files), layers[-1])
    if not record.live:
        return (image, direct_boot), layers, login, None
    before = kept_login(config, snapshot.place) if login is not None else None
    ram = snapshot.open(RAM)
    stack.callback(os.close, ram)
    machine = snapshot.open(MACHINE)
    stack.callback(os.close, machine)
    saved = SavedState(machine)
    stack.callback(saved.close)
    return (image, direct_boot), layers, login, SavedMachine(record, ram, saved, before)


def check_layers(snapshot: Snapshot) -> None:
    """Check a snapshot's layers like an image: no file may name another file of the host.

    Raises:
        SnapshotError: A layer is damaged.
    """
    from smolvm_async.state.snapshot_record import unusable

    for layer in snapshot.record.machine.layers:
        try:
            with open_image(snapshot.place / layer, layer=True):
                pass
        except ImageError as error:
            raise unusable(snapshot.path, f"{layer!r} is not a layer of a disk") from error


async def _fill(
    config: VMConfig,
    state: VMDirectory,
    machine: Machine | None,
    image: BaseImage,
    tools: HostTools,
) -> Login | None:
    """Fill the directory, unless a kept VM's first run has filled it. Return the login."""
    has_login = config.profile.makes_keys
    template = tools.firmware.vars_template if tools.firmware is not None else None
    parts = Parts(template, directories(config.profile))
    if machine is not None:
        state.check_kept(machine.layers, parts)
        return await in_thread(kept_login, config, state.path) if has_login else None
    login = None
    if has_login:
        login = await in_background(new_login, config)
        parts = parts._replace(files=await in_background(login.files, config))
    await in_thread(state.fill, qcow2.empty(image.virtual_size), parts)
    return login


async def open_boot_files(stack: ExitStack, source: Source) -> DirectBoot | None:
    """Open the kernel and the initramfs that QEMU loads, if the image has no boot loader."""
    return await in_thread(_open_boot_files, source, stack)


def _open_boot_files(source: Source, stack: ExitStack) -> DirectBoot | None:
    if source.kernel is None:
        return None
    kernel = stack.enter_context(open_kernel(source.kernel))
    initrd = stack.enter_context(open_initrd(source.initrd)) if source.initrd else None
    return DirectBoot(kernel, initrd, source.boot_args)


def _open_disk(source: Source, stack: ExitStack) -> BaseImage:
    return stack.enter_context(open_image(source.image, source.format))


def _open_files(source: Source, origin: Machine | None, made: str, stack: ExitStack) -> _BootFiles:
    image = _open_disk(source, stack)
    try_lock(image.fd, shared=True)  # QEMU inherits the lock, so the cache keeps the image
    if origin is not None:
        _check_unchanged(image, origin, made)
    return image, _open_boot_files(source, stack)


def _check_unchanged(image: BaseImage, machine: Machine, made: str) -> None:
    if (image.size, image.mtime_ns) != (machine.image_size, machine.image_mtime_ns):
        raise ImageError(
            f"image {str(image.path)!r} was changed after this {made} was made from it. The {made} "
            "stores only the differences from the image, so its disk would be corrupt. Restore the "
            f"image, or delete the {made}."
        )
