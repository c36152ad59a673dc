"""What the guest's shell is given: the command, and around it what sets its variables."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping

from smolvm_async.checks import shown
from smolvm_async.errors import ConfigError

ENV_FILE = ".smolvm_env.sh"  # in the user's home: what `set_env_vars()` has set
SHELLS = ("raw", "login")

_SOURCE = f"[ ! -r ~/{ENV_FILE} ] || . ~/{ENV_FILE}\n"


def check_command(command: object, shell: object) -> None:
    """Check a command, and what is to run it.

    Raises:
        ConfigError: If one is wrong.
    """
    if not isinstance(command, str) or not command.strip() or "\0" in command:
        raise ConfigError(
            f"command={shown(command)} is wrong: pass what a shell is to run, as str, without NUL "
            "characters; shlex.join() makes it of a list of words."
        )
    if shell not in SHELLS:
        raise ConfigError(
            f"shell={shown(shell)} is wrong: pass 'raw' (the user's shell runs the command) or "
            "'login' (it reads its profile first)."
        )


def exports(env: Mapping[str, str]) -> str:
    """A script for a POSIX shell that sets variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())


def script(command: str, shell: str, env: Mapping[str, str]) -> tuple[str, bytes]:
    """What the server is asked to run, and what has to come first on its standard input.

    The values of `env` are on the input only: a command line can be read by every user of the
    guest. The shell's `read` takes byte by byte, so that the rest is left to the command.
    """
    if shell == "login":
        command = f'exec "$SHELL" -lc {shlex.quote(command)}'
    if not env:
        return f"{_SOURCE}{command}", b""
    end = secrets.token_hex(16)
    reader = (
        "smolvm_env=\n"
        f'while IFS= read -r smolvm_line && [ "$smolvm_line" != {end} ]; do\n'
        'smolvm_env="$smolvm_env$smolvm_line\n"\n'
        "done\n"
        'eval "$smolvm_env"\n'
        "unset smolvm_env smolvm_line\n"
    )
    return f"{_SOURCE}{reader}{command}", f"{exports(env)}{end}\n".encode(errors="surrogateescape")


def parse_exports(text: str) -> dict[str, str]:
    """The variables that a script of `exports()` sets.

    Raises:
        ValueError: If it is none.
    """
    words = shlex.split(text, posix=True)
    pairs = [word.partition("=") for word in words if word != "export"]
    return {name: value for name, _, value in pairs}
