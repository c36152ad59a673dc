"""Conversion of the user's text to absolute paths, and the XDG base directories."""

from __future__ import annotations

import os
from pathlib import Path

from smolvm_async.errors import ConfigError


class PathError(ValueError):
    """The text cannot be a path. The message continues a sentence that begins with the text."""


def expand(text: str) -> str:
    """Expand `~` or `~user` at the beginning of `text`; raise `PathError` if that is impossible."""
    if _possible(text).partition("/")[0] == "~":
        return f"{str(home()).rstrip('/')}{text[1:]}" or "/"
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise PathError("names a user who does not exist")
    return expanded


def home() -> Path:
    """Return the home directory: `$HOME`, or else the home directory in the password file.

    Ignore an empty or relative `$HOME`: files would depend on the working directory.

    Raises:
        PathError: If neither is an absolute path.
    """
    for directory in (os.environ.get("HOME", ""), _recorded_home()):
        if os.path.isabs(directory):
            return Path(directory)
    raise PathError(
        f"needs a home directory, but HOME={os.environ.get('HOME', '')!r} is not an absolute path "
        f"and the password file has no home directory for user id {os.getuid()}"
    )


def _recorded_home() -> str:
    import pwd  # most processes have HOME

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


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


def xdg_home(variable: str, default: str, argument: str = "") -> Path:
    """Return the directory in an `XDG_*_HOME` variable, or else `default` in the home directory.

    Ignore a relative path in the variable, as the XDG Base Directory specification requires.

    Args:
        argument: The argument that the caller's user can pass instead, such as `data_dir=`.

    Raises:
        ConfigError: If there is no home directory.
    """
    value = os.environ.get(variable, "")
    if os.path.isabs(value):
        return Path(value)
    try:
        return home() / default
    except PathError as error:
        instead = f", or pass {argument}" if argument else ""
        raise ConfigError(
            f"The default directory {error}.",
            hint=f"Set HOME or {variable} to the absolute path of a directory that this user can "
            f"write to{instead}.",
        ) from None
