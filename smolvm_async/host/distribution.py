"""Which distribution this is, and what its packages are called."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Distribution(NamedTuple):
    """One family of distributions.

    Attributes:
        name: What messages call it.
        ids: Values of `ID` or `ID_LIKE` in os-release(5).
        install: The command that installs packages.
        packages: The package of each program, and of `ovmf`, the firmware.
    """

    name: str
    ids: tuple[str, ...]
    install: str
    packages: Mapping[str, str]

    def install_command(self, needed: Iterable[str]) -> str:
        """One command that installs the packages of all of `needed`."""
        packages = dict.fromkeys(self.packages[need] for need in needed)
        return f"{self.install} {' '.join(packages)}"


def _distribution(name: str, ids: str, install: str, packages: str) -> Distribution:
    programs = ("qemu-system-x86_64", "qemu-img", "swtpm", "ovmf", "setpriv")
    return Distribution(
        name, tuple(ids.split()), install, dict(zip(programs, packages.split(), strict=True))
    )


HOMEBREW = _distribution("Homebrew", "", "brew install", "qemu qemu swtpm qemu util-linux")
DISTRIBUTIONS = (
    _distribution(
        "Debian or Ubuntu",
        "debian ubuntu",
        "sudo apt-get install",
        "qemu-system-x86 qemu-utils swtpm ovmf util-linux",
    ),
    _distribution(
        "Fedora",
        "fedora rhel centos",
        "sudo dnf install",
        "qemu-system-x86-core qemu-img swtpm edk2-ovmf util-linux",
    ),
    _distribution(
        "Arch Linux",
        "arch",
        "sudo pacman -S",
        "qemu-system-x86 qemu-img swtpm edk2-ovmf util-linux",
    ),
    HOMEBREW,
)


def this_distribution() -> Distribution | None:
    """The distribution of this host; `None` if it is none of the known ones."""
    if sys.platform == "darwin":
        return HOMEBREW
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return None
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    return next(
        (known for name in names for known in DISTRIBUTIONS if name in known.ids),
        None,
    )


def how_to_install(needed: Iterable[str]) -> str:
    """A sentence that says how to install the packages of `needed` here."""
    needed = list(needed)
    here = this_distribution()
    if here is not None:
        return f"Install with: {here.install_command(needed)}"
    commands = "; ".join(
        f"{known.install_command(needed)} ({known.name})" for known in DISTRIBUTIONS
    )
    return f"This distribution is not known here; on others the command is: {commands}"
