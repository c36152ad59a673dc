"""Commands for the shell of a Linux guest, and the scripts that set their variables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from smolvm_async.config.checks import encoded, shown
from smolvm_async.errors import ConfigError

ENV_FILE = ".smolvm_env.sh"  # in the user's home: the variables of `set_env_vars()`
MARK = "SMOLVM_COMMAND"  # the variable that marks a command's processes
SHELLS = ("raw", "login")

SOURCE = f"[ ! -r ~/{ENV_FILE} ] || . ~/{ENV_FILE}\n"


def check_command(command: object, shell: object) -> None:
    """Check a command and the kind of its shell."""
    if not isinstance(command, str) or not command.strip() or "\0" in command:
        raise ConfigError(
            f"command={shown(command)} is wrong: pass the shell command as str, without NUL "
            "characters; shlex.join() makes a command from a list of words."
        )
    if encoded(command) is None:
        raise ConfigError(
            f"command={shown(command)} is wrong: it has a lone surrogate, which UTF-8 cannot "
            "encode; decode bytes with os.fsdecode(), or pass them as input=."
        )
    if shell not in SHELLS:
        raise ConfigError(
            f"shell={shown(shell)} is wrong: pass 'raw' (the user's shell runs the command) or "
            "'login' (it reads its profile first)."
        )


def exports(env: Mapping[str, str]) -> str:
    """Return a POSIX shell script that sets variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())


def find_marked(mark: str) -> str:
    """Return a pipeline for the shell that prints the ids of the processes with this mark.

    A shell that has just started has the mark only on its command line.
    """
    pattern = f"{MARK}=[{mark[0]}]{mark[1:]}"  # the brackets keep grep from finding itself
    return f"grep -ls '{pattern}' /proc/[0-9]*/environ /proc/[0-9]*/cmdline | cut -d/ -f3"


def parse_exports(text: str) -> dict[str, str]:
    """Return the variables that a script of `exports()` sets.

    Raises:
        ValueError: The text is not such a script.
    """
    words = shlex.split(text, posix=True)
    pairs = [word.partition("=") for word in words if word != "export"]
    return {name: value for name, _, value in pairs}
