"""What a run needs to know before it begins: the arguments, the image, and what the host has."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from smolvm_async.config import VMConfig
from smolvm_async.errors import AcceleratorWarning
from smolvm_async.host import Accelerator, HostTools, choose_accelerator, find_tools
from smolvm_async.images.debian import build_debian, check_host, find_debian
from smolvm_async.images.source import Source, own_source
from smolvm_async.limits import scope_prefix
from smolvm_async.log import get_logger
from smolvm_async.progress import ProgressCallback
from smolvm_async.shielding import in_thread
from smolvm_async.state import check_data_dir

logger = get_logger(__name__)


class Plan(NamedTuple):
    """How to launch a VM.

    Attributes:
        source: What it starts from; `None` is the built-in image, which may have to be built.
        prefix: What runs QEMU within its bounds.
    """

    config: VMConfig
    source: Source | None
    tools: HostTools
    accelerator: Accelerator
    prefix: tuple[str, ...]
    on_progress: ProgressCallback | None


def make_plan(config: VMConfig, on_progress: ProgressCallback | None) -> Plan:
    """Look at the image, the data directory and the host; nothing is created.

    Raises:
        ConfigError: If the image or the data directory cannot be used.
        HostError: If the host lacks something.
    """
    # Checked now, for an early answer, and again by the launch.
    source = own_source(config) if config.image else None
    check_data_dir(config.data_dir)
    tools = find_tools(config.profile)
    if source is None and find_debian() is None:
        check_host()
    smm = "requires-smm" in config.profile.firmware_features
    accelerator, warning = choose_accelerator(config.accel, smm=smm)
    if warning is not None:
        warnings.warn(warning, AcceleratorWarning, stacklevel=3)
    return Plan(config, source, tools, accelerator, scope_prefix(config), on_progress)


async def find_source(plan: Plan) -> Source:
    """What a VM starts from; the built-in image is built if it is not there yet.

    Raises:
        HostError, CommandError: If it cannot be built.
    """
    if plan.source is not None:
        return plan.source
    if plan.on_progress is None and await in_thread(find_debian) is None:
        logger.warning(
            "the built-in Linux is being built, once: that takes some minutes; on_progress= tells "
            "how far it is"
        )
    return Source(*await build_debian(on_progress=plan.on_progress))
