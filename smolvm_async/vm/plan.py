"""The plan of a launch: the configuration, the image, and the tools of the host."""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smolvm_async.config.options import CloneOptions, complete, make_clone_config
from smolvm_async.config.source import BuiltInImage, LocalDisk, PublishedImage, Source
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.controls.ssh.login import check_account
from smolvm_async.errors import AcceleratorWarning, HostError, NetworkWarning
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.progress import Progress, ProgressCallback, report
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.host.accelerator import Accelerator
from smolvm_async.host.tools import HostTools, choose_accelerator, find_tools
from smolvm_async.qemu.internet.trial import find_problem
from smolvm_async.qemu.sidecars import programs
from smolvm_async.state.directory import check_data_dir
from smolvm_async.vm.limits import scope_prefix

if TYPE_CHECKING:  # only VMs that need S3 or the builder import them
    from smolvm_async.images.cache import Published
    from smolvm_async.state.snapshot_record import SnapshotRecord
    from smolvm_async.state.snapshots import Snapshot

logger = get_logger(__name__)

WITHOUT_GUARD = "Without it, only mode='open' and mode='off' of internet_settings= work."
NO_NETWORK = "For a guest without a network, pass internet_settings={'mode': 'off'}."


class Plan(NamedTuple):
    """The plan of a VM's launch.

    Attributes:
        source: The files of a local disk; `None` for the built-in image, which the launch may have
            to build, and for a published image, which the launch may have to download.
        prefix: The command that runs QEMU within its limits, if there are limits.
        published: The published image, after its manifest has been read.
        by_bios: Whether the disk has a boot loader for a BIOS; `None` if this is not known yet.
            A fleet looks at the disk once for all its VMs.
        guarded: Whether a guard enforces the network policy: see `qemu/internet/`.
        snapshot: The snapshot to start from, if there is one, or its root and its name.
    """

    config: VMConfig
    source: Source | None
    tools: HostTools
    accelerator: Accelerator
    prefix: tuple[str, ...]
    on_progress: ProgressCallback | None
    published: Published | None = None
    by_bios: bool | None = None
    snapshot: Snapshot | tuple[Path, str] | None = None
    guarded: bool = True


def make_plan(
    config: VMConfig,
    on_progress: ProgressCallback | None,
    published: Published | None = None,
) -> Plan:
    """Check the image, the data directory and the host, and return the plan. Create nothing."""
    origin = config.origin
    # Check now, so that the caller gets errors early; the launch checks again.
    source = None
    if isinstance(origin, LocalDisk):
        from smolvm_async.images.local import own_source

        source = own_source(origin)
    check_data_dir(config.data_dir)
    tools, accelerator, guarded = _host(config)
    if isinstance(origin, BuiltInImage):
        from smolvm_async.images.build.debian import check_host, find_debian

        if find_debian() is None:
            check_host()
    prefix = scope_prefix(config)
    return Plan(config, source, tools, accelerator, prefix, on_progress, published, guarded=guarded)


def make_clone_plan(
    record: SnapshotRecord, snapshot: Snapshot | tuple[Path, str], options: CloneOptions
) -> Plan:
    """Check the host, and return the plan of a VM that starts from a snapshot with this record."""
    defaults: Any = {"data_dir": record.config.data_dir}
    if record.live:  # a saved machine goes on only under its own accelerator
        defaults["accel"] = record.accelerator
    config = make_clone_config(record.config, **{**defaults, **options})
    check_data_dir(config.data_dir)
    tools, accelerator, guarded = _host(config)
    source, on_progress = record.machine.source, options.get("on_progress")
    prefix = scope_prefix(config)
    return Plan(
        config,
        source,
        tools,
        accelerator,
        prefix,
        on_progress,
        snapshot=snapshot,
        guarded=guarded,
    )


def _host(config: VMConfig) -> tuple[HostTools, Accelerator, bool]:
    check_host_directories(config)
    check_account(config)
    tools = find_tools(config.profile, programs(config.profile))
    smm = "requires-smm" in config.profile.firmware_features
    accelerator, warning = choose_accelerator(config.accel, smm=smm)
    if warning is not None:
        warnings.warn(warning, AcceleratorWarning, stacklevel=_level_of_caller())
    problem = find_problem()
    mode = config.internet_settings.mode
    if problem is not None and mode == "restricted":
        raise HostError(problem.message, hint=f"{problem.hint} {WITHOUT_GUARD}".lstrip())
    if problem is not None and mode == "open":
        warning = f"The guest can reach this host's loopback and its own addresses. {problem}"
        warnings.warn(f"{warning} {NO_NETWORK}", NetworkWarning, stacklevel=_level_of_caller())
    return tools, accelerator, problem is None


def check_host_directories(config: VMConfig) -> None:
    """Check the host directories of `mounts=`."""
    if config.mounts:
        from smolvm_async.config.mounts import check_mounts
        from smolvm_async.host.shares import check_shares

        check_shares(check_mounts(config.mounts), config.data_dir)


def _level_of_caller() -> int:
    """Return the `stacklevel` of the code that called this package, for a warning of `_host()`."""
    package, level, frame = __name__.partition(".")[0], 1, sys._getframe(1)
    while frame.f_globals["__name__"].startswith(f"{package}.") and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


def check_early(config: VMConfig) -> None:
    """Check the needs of a published image's VM that are the same for every guest OS."""
    check_data_dir(config.data_dir)
    check_host_directories(config)
    find_tools(config.profile, programs(config.profile))
    scope_prefix(config)


async def find_plan(config: VMConfig, on_progress: ProgressCallback | None) -> Plan:
    """Read the manifest of a published image, and return the plan."""
    from smolvm_async.images.cache import ImageStore

    report(on_progress, Progress("image", f"reading the manifest of {config.image}", 0.0))
    published = await ImageStore().look(config.image)
    manifest = published.manifest
    config = complete(config, manifest.os, manifest.memory, manifest.cpus)
    return make_plan(config, on_progress, published)


async def find_source(plan: Plan, stack: ExitStack) -> Source:
    """Return the files that a VM starts from; first build or download them if necessary.

    The cache keeps downloaded files until `stack` is closed.
    """
    if plan.source is not None:
        return plan.source
    if isinstance(plan.config.origin, PublishedImage):
        from smolvm_async.images.cache import ImageStore

        store = ImageStore()
        published = plan.published or await store.look(plan.config.origin.uri)
        return await store.hold(published, plan.config.data_dir, plan.on_progress, stack)
    from smolvm_async.images.build.debian import build_debian, find_debian

    if plan.on_progress is None and await in_thread(find_debian) is None:
        logger.warning(
            "building the built-in Linux image; this happens once and takes some minutes; "
            "pass on_progress= to see the progress"
        )
    return Source(*await build_debian(on_progress=plan.on_progress))
