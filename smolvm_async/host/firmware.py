"""Search for UEFI firmware in QEMU's firmware descriptors, then in distributions' usual places.

QEMU's docs/interop/firmware.json specifies the descriptors. If several files have the same name,
only the file in the most specific directory counts; an empty file hides the other files. The first
match in the order of the names is used.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

MACHINE = "pc-q35-7.2"  # any q35 version matches: descriptors have patterns such as pc-q35-*


class Firmware(NamedTuple):
    """UEFI code and its variable template, with the format of each file (`raw` or `qcow2`)."""

    code: Path
    code_format: str
    vars_template: Path
    vars_format: str


# (code, variables) with Secure Boot and Microsoft's keys, for hosts without descriptors.
KNOWN_PAIRS = (
    # Debian, Ubuntu
    ("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
    ("/usr/share/OVMF/OVMF_CODE.secboot.fd", "/usr/share/OVMF/OVMF_VARS.ms.fd"),
    # Fedora, RHEL
    ("/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd"),
    # Arch
    ("/usr/share/edk2/x64/OVMF_CODE.secboot.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    # Homebrew
    (
        "/opt/homebrew/share/qemu/edk2-x86_64-secure-code.fd",
        "/opt/homebrew/share/qemu/edk2-i386-vars.fd",
    ),
    ("/usr/local/share/qemu/edk2-x86_64-secure-code.fd", "/usr/local/share/qemu/edk2-i386-vars.fd"),
)

# (code, variables) without Secure Boot; this code runs without System Management Mode (SMM).
PLAIN_PAIRS = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
)


def descriptor_directories(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the directories that contain descriptors, the least specific first."""
    own = (environ.get("XDG_CONFIG_HOME", ""), os.path.join(environ.get("HOME", ""), ".config"))
    # A relative path would lead to files of the working directory, whoever wrote them.
    config_home = next(filter(os.path.isabs, own), "/nonexistent")
    qemu = (Path("/usr/share/qemu"), Path("/etc/qemu"), Path(config_home) / "qemu")
    return tuple(directory / "firmware" for directory in qemu)


def find_firmware(
    features: frozenset[str],
    directories: Iterable[Path],
    pairs: tuple[tuple[str, str], ...] = KNOWN_PAIRS,
    without: frozenset[str] = frozenset(),
) -> Firmware | None:
    """Return the first readable firmware that has all of `features` and none of `without`."""
    described = (
        firmware
        for descriptor in _descriptors(directories)
        if (firmware := _match(descriptor, features, without)) is not None
    )
    known = (Firmware(Path(code), "raw", Path(template), "raw") for code, template in pairs)
    for firmware in (*described, *known):
        if _readable(firmware.code) and _readable(firmware.vars_template):
            return firmware
    return None


def _readable(path: Path) -> bool:
    try:
        return os.access(path, os.R_OK)
    except ValueError:  # the path has a NUL character
        return False


def places(
    directories: Iterable[Path], pairs: tuple[tuple[str, str], ...] = KNOWN_PAIRS
) -> list[str]:
    """Return the places that `find_firmware` searches, for an error message."""
    return [f"{directory}/*.json" for directory in directories] + [code for code, _ in pairs]


def _descriptors(directories: Iterable[Path]) -> Iterator[Any]:
    by_name: dict[str, Path] = {}
    for directory in directories:
        with contextlib.suppress(OSError):  # it is missing, or this user may not read it
            by_name.update((path.name, path) for path in directory.glob("*.json"))
    for _, path in sorted(by_name.items()):
        try:
            yield json.loads(path.read_bytes() or b"null")
        except (OSError, ValueError):
            continue  # a broken descriptor must not hide the others


def _match(descriptor: Any, features: frozenset[str], without: frozenset[str]) -> Firmware | None:
    try:
        mapping = descriptor["mapping"]
        if (
            "uefi" not in descriptor["interface-types"]
            or mapping["device"] != "flash"
            or mapping.get("mode", "split") != "split"
            or not features <= set(descriptor["features"])
            or without & set(descriptor["features"])
            or not any(
                target["architecture"] == "x86_64"
                and any(fnmatch(MACHINE, machine) for machine in target["machines"])
                for target in descriptor["targets"]
            )
        ):
            return None
        code, template = mapping["executable"], mapping["nvram-template"]
        return Firmware(
            Path(code["filename"]), code["format"], Path(template["filename"]), template["format"]
        )
    except (KeyError, TypeError):
        return None
