"""Prepare a run: open the image, fill the VM's directory, and make or load the SSH keys."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from smolvm_async.config.source import Source
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.controls.ssh.login import Login, kept_login, new_login
from smolvm_async.errors import ImageError
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
from smolvm_async.state.record import Machine
from smolvm_async.vm.plan import Plan, find_source

T = TypeVar("T")


class PreparedVM(NamedTuple):
    """The files and programs that a VM starts from.

    The image and the kernel stay open until QEMU has inherited them. `direct_boot` is `None` if the
    image has a boot loader. `login` is `None` if the library cannot log in to the guest OS.
    """

    source: Source
    image: BaseImage
    tools: HostTools
    direct_boot: DirectBoot | None
    login: Login | None


async def prepare(
    plan: Plan, state: VMDirectory, machine: Machine | None, stack: ExitStack
) -> PreparedVM:
    """Find and open the files that the VM starts from, and fill its directory.

    `machine` is the recorded machine of a kept VM that has run before. `stack` closes the files.
    """
    source = (machine and machine.source) or await find_source(plan, stack)
    image = await _open(stack, partial(open_image, disk_format=source.format), source.image)
    try_lock(image.fd, shared=True)  # QEMU inherits the lock, so the cache keeps the image
    direct_boot = await _open_kernel(stack, source)
    tools = plan.tools
    if _starts_by_itself(plan, source) and not await _by_bios(plan, source, image):
        tools = tools._replace(firmware=find_plain_uefi())
    login = await _fill(plan.config, state, machine, image, tools)
    return PreparedVM(source, image, tools, direct_boot, login)


async def look_at_disk(plan: Plan, source: Source) -> bool | None:
    """Return whether the disk has a boot loader for a BIOS; `None` if this does not matter."""
    if not _starts_by_itself(plan, source):
        return None
    with ExitStack() as stack:
        opener = partial(open_image, disk_format=source.format)
        return await _by_bios(plan, source, await _open(stack, opener, source.image))


def _starts_by_itself(plan: Plan, source: Source) -> bool:
    """Return whether the disk decides between BIOS and UEFI."""
    return plan.config.profile.firmware == "image" and source.kernel is None


async def _by_bios(plan: Plan, source: Source, image: BaseImage) -> bool:
    if plan.by_bios is not None:
        return plan.by_bios
    return await starts_by_bios(plan.tools.qemu_img, image.fd, source.format)


async def _fill(
    config: VMConfig,
    state: VMDirectory,
    machine: Machine | None,
    image: BaseImage,
    tools: HostTools,
) -> Login | None:
    """Fill the directory, unless a kept VM's first run has filled it. Return the login."""
    has_login = config.profile.login != "none"
    template = tools.firmware.vars_template if tools.firmware is not None else None
    parts = Parts(template, directories(config.profile))
    if machine is not None:
        state.check_kept(machine.layers, parts)
        _check_unchanged(image, machine)
        return await in_thread(kept_login, config, state.path) if has_login else None
    login = None
    if has_login:
        login = await in_background(new_login, config)
        parts = parts._replace(files=await in_background(login.files, config))
    await state.prepare(qcow2.empty(image.virtual_size), parts)
    return login


async def _open_kernel(stack: ExitStack, source: Source) -> DirectBoot | None:
    if source.kernel is None:
        return None
    kernel = await _open(stack, open_kernel, source.kernel)
    initrd = await _open(stack, open_initrd, source.initrd) if source.initrd else None
    return DirectBoot(kernel, initrd, source.boot_args)


async def _open(
    stack: ExitStack, opener: Callable[[Path], AbstractContextManager[T]], path: Path
) -> T:
    opening = opener(path)
    opened = await in_thread(opening.__enter__)
    stack.push(opening.__exit__)
    return opened


def _check_unchanged(image: BaseImage, machine: Machine) -> None:
    if (image.size, image.mtime_ns) != (machine.image_size, machine.image_mtime_ns):
        raise ImageError(
            f"image {str(image.path)!r} was changed after this VM was made from it. The VM stores "
            "only the differences from the image, so its disk would be corrupt. Restore the "
            "image, or delete() the VM."
        )
