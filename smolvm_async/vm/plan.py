"""What a run needs to know before it begins: the arguments, the image, and what the host has."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from smolvm_async.config.source import Source
from smolvm_async.config.vm_config import VMConfig, complete, is_published
from smolvm_async.errors import AcceleratorWarning
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.progress import Progress, ProgressCallback, report
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.host import Accelerator, HostTools, choose_accelerator, find_tools
from smolvm_async.images.source import own_source
from smolvm_async.qemu.sidecars import programs
from smolvm_async.state.directory import check_data_dir
from smolvm_async.vm.limits import scope_prefix

if TYPE_CHECKING:  # S3 and the builder are imported by the VMs that need them
    from smolvm_async.images.cache import Published

logger = get_logger(__name__)


class Plan(NamedTuple):
    """How to launch a VM.

    Attributes:
        source: What it starts from; `None` is the built-in image, which may have to be built, or a
            published one, which may have to be downloaded.
        prefix: What runs QEMU within its bounds.
        published: What the manifest of a published image says.
        by_bios: Whether the disk has a boot loader for a BIOS, if that was looked at for many VMs.
    """

    config: VMConfig
    source: Source | None
    tools: HostTools
    accelerator: Accelerator
    prefix: tuple[str, ...]
    on_progress: ProgressCallback | None
    published: Published | None = None
    by_bios: bool | None = None


def make_plan(
    config: VMConfig,
    on_progress: ProgressCallback | None,
    published: Published | None = None,
) -> Plan:
    """Look at the image, the data directory and the host; nothing is created.

    Raises:
        ConfigError: If the image or the data directory cannot be used.
        HostError: If the host lacks something.
    """
    # Checked now, for an early answer, and again by the launch.
    by_path = config.image and not is_published(config.image)
    source = own_source(config) if by_path else None
    check_data_dir(config.data_dir)
    tools = find_tools(config.profile, programs(config.profile))
    if not config.image:
        from smolvm_async.images.build.debian import check_host, find_debian

        if find_debian() is None:
            check_host()
    smm = "requires-smm" in config.profile.firmware_features
    accelerator, warning = choose_accelerator(config.accel, smm=smm)
    if warning is not None:
        warnings.warn(warning, AcceleratorWarning, stacklevel=3)
    prefix = scope_prefix(config)
    return Plan(config, source, tools, accelerator, prefix, on_progress, published)


def check_early(config: VMConfig) -> None:
    """What can be said of a published image's VM before its guest OS is known.

    Raises:
        ConfigError: If the data directory cannot be used.
        HostError: If the host lacks something that every guest needs.
    """
    check_data_dir(config.data_dir)
    find_tools(config.profile, programs(config.profile))
    scope_prefix(config)


async def find_plan(
    config: VMConfig, features: Mapping[str, object], on_progress: ProgressCallback | None
) -> Plan:
    """Read the manifest of a published image, and plan as for any other.

    Raises:
        ImageError: If it cannot be had, or cannot be used.
        ConfigError, HostError: If an argument or the host does not go with the guest OS.
    """
    from smolvm_async.images.cache import ImageStore

    report(on_progress, Progress("image", f"reading the manifest of {config.image}", 0.0))
    published = await ImageStore().look(config.image)
    manifest = published.manifest
    config = complete(config, manifest.os, manifest.memory, manifest.cpus, features)
    return make_plan(config, on_progress, published)


async def find_source(plan: Plan, stack: ExitStack) -> Source:
    """What a VM starts from; it is built or downloaded if it is not there yet.

    Args:
        stack: Until it is closed, what was downloaded stays.

    Raises:
        HostError, CommandError, ImageError: If it cannot be had.
    """
    if plan.source is not None:
        return plan.source
    if plan.config.image:
        from smolvm_async.images.cache import ImageStore

        store = ImageStore()
        published = plan.published or await store.look(plan.config.image)
        return await store.hold(published, plan.config.data_dir, plan.on_progress, stack)
    from smolvm_async.images.build.debian import build_debian, find_debian

    if plan.on_progress is None and await in_thread(find_debian) is None:
        logger.warning(
            "the built-in Linux is being built, once: that takes some minutes; on_progress= tells "
            "how far it is"
        )
    return Source(*await build_debian(on_progress=plan.on_progress))
