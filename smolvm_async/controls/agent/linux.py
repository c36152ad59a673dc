"""The shell programs for a Linux guest: to run a command, and to make its files.

The agent logs the path and the arguments of each program that it starts, and each user of the guest
can read command lines. So `/bin/sh` gets its program on standard input, and neither the command nor
its variables are in an argument or in a file.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from smolvm_async.controls.commands.script import MARK, SOURCE, exports, find_marked

SHELL = "/bin/sh"
REMOVER = "/bin/rm"
DIRECTORY = "/tmp"  # `_EXCLUSIVE` makes each file, with a random name
UNUSABLE = 125  # the exit code if the files of a command cannot be made

_EXCLUSIVE = "umask 077\nset -C\n"  # only the owner can read a file, and nobody has made it before
_USUAL = "umask 022\nset +C\n"
# A service of the system has no HOME. `id` would take a millisecond: only root owns /root.
_HOME = '[ -n "$HOME" ] || { [ -O /root ] && HOME=/root || HOME=/; }\nexport HOME\ncd\n'
_PROFILES = 'for file in /etc/profile ~/.profile; do [ ! -r "$file" ] || . "$file"; done\n'


def arguments(mark: str) -> list[str]:
    """Return the shell's arguments; `killer()` finds a command's processes by the mark in them."""
    return ["-s", f"{MARK}={mark}"]


def make_file(path: str) -> str:
    """Return a program that makes an empty file, which only its owner can read."""
    return f"{_EXCLUSIVE}: >{path}\n"


def program(
    command: str, shell: str, env: Mapping[str, str], mark: str, stem: str, *, has_input: bool
) -> str:
    """Return the program that runs a command with its output in files.

    Args:
        command: The command, for the shell.
        shell: "login" reads the profiles first.
        env: The command's variables.
        mark: The mark of the command's processes.
        stem: The path of the files, without `.in`, `.out` and `.err`.
        has_input: Whether there is a file with the standard input.
    """
    source = f"{stem}.in" if has_input else "/dev/null"
    files = f"<{source} >{stem}.out 2>{stem}.err"
    profiles = _PROFILES if shell == "login" else ""
    # The shell reads up to the closing brace first: in the braces, its own input changes.
    return (
        f"{{\n{_EXCLUSIVE}exec {files} || exit {UNUSABLE}\n{_USUAL}shift\n"
        f"{_HOME}{profiles}export {MARK}={mark}\n{SOURCE}"
        f"{exports(env)}eval {shlex.quote(command)}\nexit\n}}\n"
    )


def killer(mark: str) -> str:
    """Return a program that kills every process of a command.

    A process that another program is just being loaded into has no environment, so the program
    looks until it has found nothing twice.
    """
    return (
        "none=0 round=0\n"
        "while [ $none -lt 2 ] && [ $round -lt 100 ]; do\n"
        f"found=$({find_marked(mark)})\n"
        'if [ -n "$found" ]; then none=0; kill -KILL $found; else none=$((none + 1)); fi\n'
        "round=$((round + 1))\n"
        "sleep 0.02\n"
        "done 2>/dev/null\n"
    )
