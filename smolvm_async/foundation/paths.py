"""Conversion of the user's text to absolute paths, and the XDG base directories."""

from __future__ import annotations

import os
from pathlib import Path


class PathError(ValueError):
    """The text cannot be a path. The message continues a sentence that begins with the text."""


def expand(text: str) -> str:
    """Expand `~` or `~user` at the beginning of `text`; raise `PathError` if that is impossible."""
    expanded = os.path.expanduser(_possible(text))
    if expanded.startswith("~"):
        raise PathError("names a user who does not exist")
    return expanded


def absolute(text: str) -> Path:
    """Return `text` as an absolute path; keep `..`, since only the kernel knows symbolic links.

    Raises:
        PathError: If `text` cannot be a path, or is relative to a deleted working directory.
    """
    try:
        return Path(_possible(text)).absolute()
    except FileNotFoundError:
        raise PathError("is relative to a working directory that was deleted") from None


def _possible(text: str) -> str:
    try:
        if b"\0" in os.fsencode(text):
            raise PathError("has a NUL character, which a path cannot have")
    except UnicodeEncodeError:
        raise PathError("has a character that a path cannot have (a lone surrogate)") from None
    return text


def xdg_home(variable: str, default: str) -> Path:
    """Return the directory in an `XDG_*_HOME` variable, or else `default` in the home directory.

    Ignore a relative path in the variable, as the XDG Base Directory specification requires.
    """
    value = os.environ.get(variable, "")
    return Path(value) if os.path.isabs(value) else Path.home() / default
