"""What the guest's shell is given: the command, and around it what sets its variables."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping

from smolvm_async.config.checks import shown
from smolvm_async.errors import ConfigError

ENV_FILE = ".smolvm_env.sh"  # in the user's home: what `set_env_vars()` has set
MARK = "SMOLVM_COMMAND"  # a variable
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
    try:
        command.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"command={shown(command)} is wrong: it has a lone surrogate, which no UTF-8 has; pass "
            "such bytes as input=."
        ) from None
    if shell not in SHELLS:
        raise ConfigError(
            f"shell={shown(shell)} is wrong: pass 'raw' (the user's shell runs the command) or "
            "'login' (it reads its profile first)."
        )


def exports(env: Mapping[str, str]) -> str:
    """A script for a POSIX shell that sets variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())


def script(command: str, shell: str, env: Mapping[str, str], mark: str) -> tuple[str, bytes]:
    """What the server is asked to run, and what has to come first on its standard input.

    `mark` is in the environment of every process that it starts: `killer()` finds them by it.

    The values of `env` are on the input only: a command line can be read by every user of the
    guest. The shell's `read` takes byte by byte, so that the rest is left to the command.
    """
    if shell == "login":
        command = f'exec "$SHELL" -lc {shlex.quote(command)}'
    source = f"export {MARK}={mark}\n{_SOURCE}"
    if not env:
        return f"{source}{command}", b""
    end = secrets.token_hex(16)
    reader = (
        "smolvm_env=\n"
        f'while IFS= read -r smolvm_line && [ "$smolvm_line" != {end} ]; do\n'
        'smolvm_env="$smolvm_env$smolvm_line\n"\n'
        "done\n"
        'eval "$smolvm_env"\n'
        "unset smolvm_env smolvm_line\n"
    )
    return f"{source}{reader}{command}", f"{exports(env)}{end}\n".encode(errors="surrogateescape")


def killer(mark: str) -> str:
    """A script that kills what `script()` has started.

    OpenSSH has a request for that, but refuses it for root; and a process that has left the
    command's group would not be reached. The shell itself has the mark on its command line only.
    """
    pattern = f"{MARK}=[{mark[0]}]{mark[1:]}"  # which does not match itself
    places = "/proc/[0-9]*/environ /proc/[0-9]*/cmdline"
    find = f"grep -ls '{pattern}' {places} | cut -d/ -f3"
    own = f"for again in 1 2; do kill -KILL $({find}) 2>/dev/null; done"
    return f"{own}\n{_AS_ROOT} sudo -n sh -c {shlex.quote(_tree_killer(find))}"


# Only root may kill what a user has started with sudo, and see by the mark that it is sudo's.
_AS_ROOT = '[ "$(id -u)" = 0 ] || ! grep -qsx sudo /proc/[0-9]*/comm ||'


def _tree_killer(find: str) -> str:
    """A script that also kills all descendants, whose environment sudo has cleared."""
    parents = "^PPid:.($(echo $next | tr ' ' '|'))\\$"
    return (
        f"all=; next=$({find})\n"
        'while [ -n "$next" ]; do\n'
        'all="$all $next"\n'
        f'next=$(grep -lsE "{parents}" /proc/[0-9]*/status | cut -d/ -f3)\n'
        "done\n"
        "kill -KILL $all 2>/dev/null"
    )


def parse_exports(text: str) -> dict[str, str]:
    """The variables that a script of `exports()` sets.

    Raises:
        ValueError: If it is none.
    """
    words = shlex.split(text, posix=True)
    pairs = [word.partition("=") for word in words if word != "export"]
    return {name: value for name, _, value in pairs}
