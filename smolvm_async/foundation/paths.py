"""The user's texts → absolute paths, and the directories that the XDG specification names."""

from __future__ import annotations

import os
from pathlib import Path


class PathError(ValueError):
    """Why a text names no path: the rest of a sentence about it."""


def expand(text: str) -> str:
    """`~` and `~user` at its beginning replaced.

    Raises:
        PathError: If there is no such user, or no path can be that.
    """
    expanded = os.path.expanduser(_possible(text))
    if expanded.startswith("~"):
        raise PathError("names a user who does not exist")
    return expanded


def absolute(text: str) -> Path:
    """The absolute path; not normalized: `..` after a symbolic link is the kernel's.

    Raises:
        PathError: If no path can be that, or it is relative and there is nothing to start from.
    """
    try:
        return Path(_possible(text)).absolute()
    except FileNotFoundError:
        raise PathError("is relative to a working directory that is gone") from None


def _possible(text: str) -> str:
    try:
        if b"\0" in os.fsencode(text):
            raise PathError("has a NUL character, which no path has")
    except UnicodeEncodeError:
        raise PathError("has a character that no path can have (a lone surrogate)") from None
    return text


def xdg_home(variable: str, default: str) -> Path:
    """The directory that an `XDG_*_HOME` variable names; `default` below the home if none.

    A relative one is ignored, as the XDG Base Directory specification says.
    """
    value = os.environ.get(variable, "")
    return Path(value) if os.path.isabs(value) else Path.home() / default
