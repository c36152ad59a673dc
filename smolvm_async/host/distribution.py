"""This host's distribution, and the names of the packages to install on it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from typing import Literal, NamedTuple


class Program(NamedTuple):
    """A program (or the firmware), and the name of its package in each package manager."""

    name: str
    apt: str
    dnf: str
    pacman: str
    brew: str


QEMU = Program(
    "qemu-system-x86_64",
    apt="qemu-system-x86",
    dnf="qemu-system-x86-core",
    pacman="qemu-system-x86",
    brew="qemu",
)
QEMU_IMG = Program("qemu-img", apt="qemu-utils", dnf="qemu-img", pacman="qemu-img", brew="qemu")
OVMF = Program("ovmf", apt="ovmf", dnf="edk2-ovmf", pacman="edk2-ovmf", brew="qemu")
SETPRIV = Program("setpriv", *("util-linux",) * 4)


class Distribution(NamedTuple):
    """A family of Linux distributions, or Homebrew.

    Attributes:
        name: The name in messages.
        ids: Values of `ID` or `ID_LIKE` in os-release(5).
        manager: The package manager, which is also the name of a field of `Program`.
        install: The command that installs packages.
    """

    name: str
    ids: tuple[str, ...]
    manager: Literal["apt", "dnf", "pacman", "brew"]
    install: str

    def install_command(self, needed: Iterable[Program]) -> str:
        """Return one command that installs the packages of all `needed` programs."""
        packages = dict.fromkeys(str(getattr(program, self.manager)) for program in needed)
        return f"{self.install} {' '.join(packages)}"


HOMEBREW = Distribution("Homebrew", (), "brew", "brew install")
DISTRIBUTIONS = (
    Distribution("Debian or Ubuntu", ("debian", "ubuntu"), "apt", "sudo apt-get install"),
    Distribution("Fedora", ("fedora", "rhel", "centos"), "dnf", "sudo dnf install"),
    Distribution("Arch Linux", ("arch",), "pacman", "sudo pacman -S"),
    HOMEBREW,
)


def this_distribution() -> Distribution | None:
    """Return the distribution of this host; `None` if it is not in `DISTRIBUTIONS`."""
    if sys.platform == "darwin":
        return HOMEBREW
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return None
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    return next((known for name in names for known in DISTRIBUTIONS if name in known.ids), None)


def how_to_install(needed: Iterable[Program]) -> str:
    """Return a sentence that says how to install the `needed` programs on this host."""
    needed = list(needed)
    here = this_distribution()
    if here is not None:
        return f"Install with: {here.install_command(needed)}"
    commands = "; ".join(
        f"{known.install_command(needed)} ({known.name})" for known in DISTRIBUTIONS
    )
    return (
        "This distribution is unknown to smolvm_async. "
        f"On the supported distributions, the commands are: {commands}"
    )
