"""What a run needs to know before it begins: the arguments, the image, and what the host has."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from smolvm_async.config import VMConfig
from smolvm_async.errors import AcceleratorWarning
from smolvm_async.host import Accelerator, HostTools, choose_accelerator, find_tools
from smolvm_async.images.local import open_image
from smolvm_async.images.reference import local_path
from smolvm_async.limits import scope_prefix
from smolvm_async.progress import ProgressCallback
from smolvm_async.state import check_data_dir


class Plan(NamedTuple):
    """How to launch a VM.

    Attributes:
        prefix: What runs QEMU within its bounds.
    """

    config: VMConfig
    image: Path
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
    path = local_path(config.image)
    with open_image(path):
        pass  # checked now, for an early answer, and again by the launch
    check_data_dir(config.data_dir)
    tools = find_tools(config.profile)
    accelerator, warning = choose_accelerator(config.accel)
    if warning is not None:
        warnings.warn(warning, AcceleratorWarning, stacklevel=3)
    return Plan(config, path, tools, accelerator, scope_prefix(config), on_progress)
