"""The stand-in: a small signed Linux disk that boots the way a Windows guest does.

A Windows image cannot be shipped or built, so this disk tests the same machine: q35 with SMM, UEFI
Secure Boot with Microsoft's keys (shim, GRUB and kernel are signed by Debian), TPM 2.0 and
virtio-scsi. The guest describes its machine on the serial console, as `STAND-IN: key=value`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

from smolvm_async.errors import ConfigError, HostError
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.images.build.workshop import check_programs
from stand_in import system
from stand_in.builder import Builder

__all__ = ["GUEST_OPTIONS", "build_stand_in"]

# The kernel arguments `stand_in.NAME=VALUE` that init.sh understands.
GUEST_OPTIONS = {
    "power_button": ("ignore",),  # report a press on the console, and do nothing else
    "agent": ("off",),
    "ssh": ("on",),  # run an SSH server: the user Administrator has the password stand-in
    "shell": ("on",),  # after `ready`, run each line that arrives on the serial console
    "then": ("reboot", "panic", "poweroff"),  # once, after `ready`; reboot only on the first boot
}

PROGRAMS = {  # the programs that the build runs, and their packages
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
    "sfdisk": "fdisk",
    "mformat": "mtools",
    "mmd": "mtools",
    "mcopy": "mtools",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "qemu-img": "qemu-utils",
}


async def build_stand_in(
    *,
    cache_dir: Path | None = None,
    desktop: bool = False,
    kernel_arguments: Sequence[str] = (),
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Build the stand-in, or find it in the cache.

    The first build downloads 35 MB of packages; the first build with `desktop` downloads another
    71 MB. Variants that differ only in kernel arguments share their base, and each takes less than
    a second. You may delete the cache at any time. The build was tested on Debian 12. The names of
    Ubuntu's packages and files are in the code, but untested.

    Args:
        cache_dir: The directory for disks and packages; by default `~/.cache/smolvm-async`.
        desktop: Use screen, keyboard, mouse and tablet: show typed text on the screen, and report
            each input event on the serial console (see guest/desktop.sh).
        kernel_arguments: Arguments to add to the guest's kernel command line (`GUEST_OPTIONS`).
        on_progress: Called for each step.

    Returns:
        A read-only qcow2 file. Its name depends on its content.

    Raises:
        ConfigError: If a kernel argument is unknown or cannot be passed to the kernel.
        HostError: If the host is not Debian or Ubuntu, lacks a program, or the cache cannot be
            written.
        CommandError: If a package cannot be downloaded, or a program fails.
    """
    _check_arguments(kernel_arguments)
    cache = cache_dir or xdg_home("XDG_CACHE_HOME", ".cache") / "smolvm-async"
    flavour = system.DESKTOP if desktop else system.PLAIN
    builder = await asyncio.to_thread(Builder, cache, flavour, kernel_arguments, on_progress)
    try:
        found = await asyncio.to_thread(builder.find)
        if found is None:
            check_programs("the stand-in", PROGRAMS)
            found = await builder.build()
    except OSError as error:
        raise HostError(f"The stand-in cannot be built in {cache}: {error}") from error
    return found


def _check_arguments(arguments: Sequence[str]) -> None:
    choices = {f"stand_in.{n}={value}" for n, values in GUEST_OPTIONS.items() for value in values}
    for argument in arguments:
        if argument.startswith("stand_in.") and argument not in choices:
            raise ConfigError(
                f"The stand-in does not know the kernel argument {argument!r}: use one of "
                f"{', '.join(sorted(choices))}."
            )
        if not re.fullmatch(r"[!-~]+", argument) or re.search(r"['\"\\]", argument):
            raise ConfigError(
                f"{argument!r} cannot be a kernel argument of the stand-in: "
                "use printable ASCII without spaces, quotes and backslashes."
            )
