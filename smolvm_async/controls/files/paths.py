"""Paths in a guest: checked before anything is copied.

Windows cannot keep all names that Linux can: a directory of this host that has such a name is
refused before the first byte is sent. No Windows was run: Microsoft's page "Naming Files, Paths,
and Namespaces" has these rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath
from stat import S_IFLNK

from smolvm_async.config.checks import encoded, shown
from smolvm_async.controls.files.tree import Entry
from smolvm_async.errors import ConfigError

MOST = 259  # characters of a path; most programs of Windows refuse more
# Names of devices, in every directory and with every suffix.
RESERVED = r"(?i:CON|PRN|AUX|NUL|COM[1-9¹²³]|LPT[1-9¹²³]|CONIN\$|CONOUT\$) *(\..*)?"
FORBIDDEN = r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]'


def check_guest_path(path: object, name: str = "guest_path", *, windows: bool = False) -> str:
    """Check a path in the guest, and return the path with slashes; `name` is the argument's.

    A slash at the end means a directory, so the slash stays.
    """
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if windows:
        return _check_windows_path(path, name)
    if (
        not isinstance(path, str)
        or not path.startswith("/")
        or "\0" in path
        or encoded(path) is None
    ):
        raise ConfigError(
            f"{name}={shown(path)} is wrong: pass an absolute path in the guest, such as "
            "'/root/data.csv'; os.fsdecode() makes a path from bytes."
        )
    return path


def without_slash(path: str) -> str:
    """Return a checked path without the slash at the end; a root keeps its slash."""
    # In Windows, `C:` is another directory than `C:/`.
    return path if path.endswith(":/") else path.rstrip("/") or "/"


def name_of(path: str) -> str:
    """Return the last name of a checked path, without the slash; empty for a root."""
    root = PureWindowsPath(path) if path[1:2] == ":" else PurePosixPath(path)
    return root.name


def _check_windows_path(path: object, name: str) -> str:
    if not isinstance(path, str) or not re.match(r"[A-Za-z]:[/\\]", path):
        raise ConfigError(
            f"{name}={shown(path)} is wrong: pass an absolute path in the guest with its "
            r"drive, such as r'C:\Users\me\data.csv'."
        )
    plain = path.replace("\\", "/")
    names = [name for name in plain[3:].split("/") if name]
    for part in names:
        if problem := name_problem(part):
            raise ConfigError(f"{name}={shown(path)} is wrong: {problem}.")
    whole = "/".join((plain[:2], *names))
    if len(whole) > MOST:
        raise ConfigError(f"{name}={shown(path)} has more than {MOST} characters.")
    return f"{whole}/" if not names or plain.endswith("/") else whole


def name_problem(name: str) -> str:
    """Return the reason why Windows cannot keep a file of this name; empty if it can."""
    if re.fullmatch(RESERVED, name):
        return f"in Windows, {name!r} is the name of a device: choose another name"
    if name.endswith((".", " ")):  # Windows silently removes them; `..` ends with a dot, too
        return f"in Windows, no name ends with a dot or a space, as {name!r} does"
    if found := re.search(FORBIDDEN, name):
        return f"in Windows, {found[0]!r} is not allowed in a name, as in {name!r}"
    return ""


def check_windows_tree(tree: Sequence[Entry], target: str) -> None:
    """Check that Windows can keep a tree of this host.

    Raises:
        ConfigError: A name is not allowed, two names differ only in case, a path is too long, or
            the tree has a link.
    """
    seen: dict[str, str] = {}
    for entry in tree:
        for name in filter(None, entry.path.split("/")):
            if problem := name_problem(name):
                raise ConfigError(f"local_path= cannot be copied: {problem} ({entry.path!r}).")
        if entry.kind == S_IFLNK:
            reason = "it is a link: copy the file that it leads to"
            raise ConfigError(f"local_path= cannot be copied to Windows: {entry.path!r}: {reason}.")
        if len(f"{target}/{entry.path}".rstrip("/")) > MOST:
            reason = f"its path would have more than {MOST} characters in the guest"
            raise ConfigError(f"local_path= cannot be copied: {entry.path!r}: {reason}.")
        same = seen.setdefault(entry.path.lower(), entry.path)
        if same != entry.path:
            reason = f"in Windows, {same!r} and {entry.path!r} are the same name"
            raise ConfigError(f"local_path= cannot be copied: {reason}.")
