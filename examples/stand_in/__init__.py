"""The stand-in: a small signed Linux disk that boots the way a Windows guest does.

No Windows image can be shipped or built, so this disk exercises the same path: q35 with SMM,
UEFI Secure Boot with Microsoft's keys (shim, GRUB and kernel are Debian's signed ones),
TPM 2.0 and virtio-scsi. What it finds it says on the serial console: `STAND-IN: key=value`.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from smolvm_async.errors import ConfigError, HostError
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.images.build.workshop import distribution, search_path
from stand_in import system
from stand_in.builder import Builder

__all__ = ["GUEST_OPTIONS", "build_stand_in"]

# The kernel arguments `stand_in.NAME=VALUE` that init.sh understands.
GUEST_OPTIONS = {
    "power_button": ("ignore",),  # a press is said on the console, nothing else happens
    "agent": ("off",),
    "then": ("reboot", "panic", "poweroff"),  # once, after `ready`; reboot: on the first boot
    "flood": ("serial", "agent"),  # after `ready`, write to the console without end
}

PROGRAMS = {
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

    The first build fetches 35 MB of packages, the first desktop 71 MB more; a variant with other
    kernel arguments shares the rest with it and takes under a second. The cache may be deleted at
    any time, and keeps the packages of the first build until then. Tested on Debian 12; Ubuntu's
    names of packages and files are provided for, but nobody has tried it there.

    Args:
        cache_dir: Where results and packages are kept; `~/.cache/smolvm-async` if not given.
        desktop: Whether it uses screen, keyboard, mouse and tablet: what is typed appears on the
            screen, and each input event on the serial console, as guest/desktop.sh explains.
        kernel_arguments: Added to the guest's kernel command line; see `GUEST_OPTIONS`.
        on_progress: Called with each step.

    Returns:
        A qcow2 file, read-only, of a name that changes with its content.

    Raises:
        ConfigError: If a kernel argument is unknown or cannot be passed on.
        HostError: If the host is not Debian or Ubuntu, lacks a program, or the cache cannot be
            written.
        CommandError: If a package cannot be fetched, or a program fails.
    """
    _check_arguments(kernel_arguments)
    cache = cache_dir or xdg_home("XDG_CACHE_HOME", ".cache") / "smolvm-async"
    flavour = system.DESKTOP if desktop else system.PLAIN
    builder = await asyncio.to_thread(Builder, cache, flavour, kernel_arguments, on_progress)
    try:
        found = await asyncio.to_thread(builder.find)
        if found is None:
            _check_host()
            found = await builder.build()
    except OSError as error:
        raise HostError(f"The stand-in cannot be built in {cache}: {error}") from error
    return found


def _check_arguments(arguments: Sequence[str]) -> None:
    choices = {f"stand_in.{n}={value}" for n, values in GUEST_OPTIONS.items() for value in values}
    for argument in arguments:
        if argument.startswith("stand_in.") and argument not in choices:
            raise ConfigError(
                f"The stand-in does not know the kernel argument {argument!r}. "
                f"It knows {', '.join(sorted(choices))}."
            )
        if not re.fullmatch(r"[!-~]+", argument) or re.search(r"['\"\\]", argument):
            raise ConfigError(
                f"{argument!r} cannot be a kernel argument of the stand-in: "
                "it must be printable ASCII without spaces, quotes and backslashes."
            )


def _check_host() -> None:
    """Ask for what the build needs before anything is made."""
    distribution("The stand-in")
    path = search_path()
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    for name in ("apt-get", "dpkg-deb"):
        if name in missing:
            raise HostError(
                "The stand-in is built from Debian's or Ubuntu's packages and needs such a host: "
                f"there is no {name}."
            )
    if missing:
        wanted = " ".join(sorted({PROGRAMS[name] for name in missing}))
        raise HostError(
            f"To build the stand-in this host lacks {', '.join(missing)}. "
            f"Install them with: sudo apt-get install {wanted}"
        )
