"""This host's programs, firmware and accelerator, each looked up once per process."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from smolvm_async.errors import HostError
from smolvm_async.foundation.process import check_pidfds
from smolvm_async.guests import GuestProfile
from smolvm_async.host import accelerator, firmware
from smolvm_async.host.accelerator import Accelerator, Problem
from smolvm_async.host.distribution import OVMF, QEMU, QEMU_IMG, SETPRIV, Program, how_to_install
from smolvm_async.host.firmware import Firmware


class HostTools(NamedTuple):
    """The programs and the firmware that a guest OS needs, as absolute paths.

    Attributes:
        firmware: UEFI firmware; `None` if the guest does not need UEFI.
        sidecars: The programs that run beside QEMU, by name.
    """

    qemu: Path
    qemu_img: Path
    firmware: Firmware | None
    sidecars: Mapping[str, Path] = MappingProxyType({})


def find_tools(profile: GuestProfile, sidecars: Iterable[Program]) -> HostTools:
    """Find all programs and the firmware that a guest of `profile` needs.

    Args:
        sidecars: The programs of the guest's sidecars: `qemu.sidecars.programs(profile)`. This is
            an argument because this folder must not import `qemu`.

    Raises:
        HostError: If a program or the firmware is missing, or if the host refuses pidfds. The error
            lists everything that is missing, how to install it, and the places searched.
    """
    if sys.platform not in profile.hosts:
        raise HostError(
            f"{profile.title} guests need a Linux host; this host is {sys.platform!r}.",
            hint="Run this on a Linux machine, or in a Linux VM with nested virtualization.",
            missing=("linux",),
        )
    check_pidfds()
    search_path = os.environ.get("PATH", os.defpath)
    features = profile.firmware_features if profile.firmware == "always" else None
    directories = firmware.descriptor_directories(os.environ)
    return _find_tools(tuple(sidecars), features, search_path, directories)


def find_plain_uefi() -> Firmware:
    """Find UEFI firmware without Secure Boot."""
    return _find_plain_uefi(firmware.descriptor_directories(os.environ))


# Without the cache, each VM of a fleet would read the descriptors and block the event loop.
@functools.lru_cache(maxsize=8)
def _find_plain_uefi(directories: tuple[Path, ...]) -> Firmware:
    smm = frozenset({"requires-smm"})
    found = firmware.find_firmware(frozenset(), directories, firmware.PLAIN_PAIRS, without=smm)
    if found is None:
        raise HostError(
            "UEFI firmware (OVMF) not found, and the image has no boot sector for a BIOS. "
            f"Looked in: {', '.join(firmware.places(directories, firmware.PLAIN_PAIRS))}.",
            hint=how_to_install([OVMF]),
            missing=(OVMF.name,),
        )
    return found


@functools.lru_cache(maxsize=8)  # exceptions are not cached, so a program installed later is found
def _find_tools(
    sidecars: tuple[Program, ...],
    features: frozenset[str] | None,
    search_path: str,
    directories: tuple[Path, ...],
) -> HostTools:
    programs = (QEMU, QEMU_IMG, *sidecars, SETPRIV)
    found = {program: shutil.which(program.name, path=search_path) for program in programs}
    pair = None if features is None else firmware.find_firmware(features, directories)
    missing = [program for program, path in found.items() if path is None]
    looked = [f"PATH ({search_path})"] if missing else []
    if features is not None and pair is None:
        missing.append(OVMF)
        looked += firmware.places(directories)
    if missing:
        named = [
            "UEFI firmware with Secure Boot (OVMF)" if program is OVMF else program.name
            for program in missing
        ]
        from smolvm_async.host.restrictions import find_noexec  # rarely needed

        forbidden = [find_noexec(program.name, search_path) for program in missing]
        reasons = [f" {problem.reason}." for problem in forbidden if problem is not None]
        cures = [problem.cure for problem in forbidden if problem is not None]
        raise HostError(
            f"{', '.join(named)} not found. Looked in: {', '.join(looked)}.{''.join(reasons)}",
            hint=" ".join(dict.fromkeys(cures)) or how_to_install(missing),
            missing=tuple(program.name for program in missing),
        )
    paths = {program: Path(path).absolute() for program, path in found.items() if path is not None}
    beside = {program.name: paths[program] for program in sidecars}
    return HostTools(paths[QEMU], paths[QEMU_IMG], pair, beside)


_kvm_works: set[bool] = set()  # the values of `smm` with which a probe has succeeded


def _kvm_problem(smm: bool) -> Problem | None:
    """Probe KVM until a probe succeeds, so that a module loaded later is found."""
    if smm in _kvm_works:
        return None
    problem = accelerator.probe_kvm(smm=smm)
    if problem is None:
        _kvm_works.add(smm)
    return problem


def choose_accelerator(requested: str, *, smm: bool = True) -> tuple[Accelerator, str | None]:
    """Return the accelerator to use, and a warning if `auto` falls back to TCG.

    Args:
        requested: `auto`, `kvm` or `tcg`.
        smm: Whether the guest has Secure Boot, which needs System Management Mode.

    Raises:
        HostError: If `kvm` is requested and this host cannot use KVM.
    """
    if requested == "tcg":
        return accelerator.TCG, None
    problem = _kvm_problem(smm)
    if problem is None:
        return accelerator.KVM, None
    if requested == "kvm":
        raise HostError(
            f"accel='kvm' cannot be used: {problem.reason}.",
            hint=f"{problem.cure} Or pass accel='tcg': software emulation, many times slower.",
            missing=("kvm",),
        )
    return accelerator.TCG, (
        f"KVM cannot be used: {problem.reason}. The guest runs under TCG (software emulation), "
        f"many times slower. {problem.cure} Pass accel='tcg' to silence this warning."
    )
