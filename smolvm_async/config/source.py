"""What a guest starts from: a disk, and the kernel if QEMU itself is to load one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """Where a guest starts from, as absolute paths.

    Attributes:
        image: The qcow2.
        kernel: What QEMU loads; `None` if the image has a boot loader.
        initrd: Its initramfs, or `None`.
        boot_args: The kernel's command line.
        format: The disk's: `qcow2`, or `raw` if whoever published it says so.
    """

    image: Path
    kernel: Path | None = None
    initrd: Path | None = None
    boot_args: str = ""
    format: str = "qcow2"
