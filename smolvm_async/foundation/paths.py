"""Make absolute paths of a user's texts, and find the directories of the XDG specification."""

from __future__ import annotations

import os
from pathlib import Path


class PathError(ValueError):
    """The reason why a text is not a path: the rest of a sentence that begins with the text."""


def expand(text: str) -> str:
    """Replace `~` or `~user` at the beginning of `text`; raise `PathError` if it is wrong."""
    expanded = os.path.expanduser(_possible(text))
    if expanded.startswith("~"):
        raise PathError("names a user who does not exist")
    return expanded


def absolute(text: str) -> Path:
    """Return the absolute path; `..` stays, since only the kernel knows symbolic links.

    Raises:
        PathError: If `text` cannot be a path, or is relative to a working directory that is gone.
    """
    try:
        return Path(_possible(text)).absolute()
    except FileNotFoundError:
        raise PathError("is relative to a working directory that is gone") from None


def _possible(text: str) -> str:
    try:
        if b"\0" in os.fsencode(text):
            raise PathError("has a NUL character, which a path cannot have")
    except UnicodeEncodeError:
        raise PathError("has a character that a path cannot have (a lone surrogate)") from None
    return text


def xdg_home(variable: str, default: str) -> Path:
    """Return the directory of an `XDG_*_HOME` variable; by default, `default` in the home.

    A relative path is ignored, as the XDG Base Directory specification demands.
    """
    value = os.environ.get(variable, "")
    return Path(value) if os.path.isabs(value) else Path.home() / default
