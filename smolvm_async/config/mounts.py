"""Host directories that a Linux guest sees: the argument `mounts=`, checked.

Nothing here looks at the host: `host/shares.py` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from smolvm_async.config.checks import check_boolean, check_path, encoded, shown
from smolvm_async.errors import ConfigError

MOST = 8  # the functions of one PCI slot: see `qemu/mounts.py`
DEFAULT = "/workspace"
# A mount there would hide files that the guest needs to run, or its start would clean the mount up.
SYSTEM_PATHS = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin"),
    *("/sys", "/tmp", "/usr", "/var"),
)
# A mount there would hide the guest's own files; a mount below one is fine.
OWN_PATHS = ("/home", "/mnt", "/opt", "/root", "/srv", DEFAULT)
LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, in Linux
UNSAFE = re.compile(r"[\x00-\x1f\x7f]")
FORMS = "pass 'SRC', 'SRC:DST' or 'SRC:DST:rw'"
EXAMPLE = "pass a path like /mnt/data"


class Mount(NamedTuple):
    """A host directory and its path in the guest. As text, it is an entry of `mounts=`."""

    source: Path
    target: str
    writable: bool = False

    def __str__(self) -> str:
        return f"{self.source}:{self.target}:{'rw' if self.writable else 'ro'}"


def check_mounts(mounts: object, writable: object = False) -> tuple[Mount, ...]:
    """Return the mounts that the entries `SRC[:DST][:rw|:ro]` name.

    Args:
        writable: Whether the guest may change directories whose entries do not say so.

    Raises:
        ConfigError: An entry, or two together, cannot be mounted.
    """
    all_writable = check_boolean("writable_mounts", writable)
    if isinstance(mounts, (str, bytes)) or not isinstance(mounts, Sequence):
        raise ConfigError(
            f"mounts={shown(mounts)} is not a list: pass strings, for example "
            "['~/project', '~/data:/mnt/data:rw']."
        )
    if len(mounts) > MOST:
        raise ConfigError(
            f"mounts= has {len(mounts)} entries: pass at most {MOST}, for example a directory "
            "that contains the others."
        )
    found = tuple(_mount(entry, all_writable) for entry in mounts)
    for one, other in combinations(found, 2):
        _check_apart(one.target, other.target)
    return found


def _mount(entry: object, all_writable: bool) -> Mount:
    if isinstance(entry, os.PathLike):
        entry = os.fspath(entry)
    if not isinstance(entry, str) or encoded(entry) is None:
        raise _wrong(entry, "it is not UTF-8 text", FORMS)
    source, *rest = entry.split(":")
    writable = all_writable
    if rest and rest[-1] in ("rw", "ro"):
        writable = rest.pop() == "rw"
    if len(rest) > 1:
        raise _wrong(entry, "it has too many colons", FORMS)
    if UNSAFE.search(entry):
        raise _wrong(entry, "it has a control character", "rename the directory")
    directory = check_path(source, "mounts", "a directory")
    name = os.path.basename(os.path.normpath(directory))
    target = rest[0] if rest else f"{DEFAULT}/{name}"
    _check_target(entry, target)
    return Mount(directory, target, writable)


def _check_target(entry: str, target: str) -> None:
    parts = target.split("/")
    if not target.startswith("/"):
        raise _wrong(entry, f"the guest path {target!r} is not absolute", EXAMPLE)
    if "" in parts[1:] or "." in parts or ".." in parts:
        raise _wrong(entry, f"the guest path {target} is / or has an empty part or dots", EXAMPLE)
    if len(target.encode()) > LONGEST_PATH or any(
        len(part.encode()) > LONGEST_NAME for part in parts
    ):
        raise _wrong(entry, "the guest path is too long", EXAMPLE)
    if target in OWN_PATHS or f"/{parts[1]}" in SYSTEM_PATHS:
        raise _wrong(entry, f"{target} would hide files of the guest", EXAMPLE)


def _check_apart(one: str, other: str) -> None:
    if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
        raise ConfigError(
            f"mounts: the guest paths {one} and {other} are equal, or one is inside the other: "
            "give each mount a path of its own, as in 'SRC:/mnt/data'."
        )


def _wrong(entry: object, fault: str, advice: str) -> ConfigError:
    return ConfigError(f"mounts: {shown(entry)} cannot be mounted: {fault}. Instead, {advice}.")
