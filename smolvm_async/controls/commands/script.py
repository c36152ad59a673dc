"""Commands for the shell of a Linux guest, and the scripts that set their variables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from smolvm_async.config.checks import encoded, shown
from smolvm_async.errors import ConfigError

ENV_FILE = ".smolvm_env.sh"  # in the user's home: the variables of `set_env_vars()`
WINDOWS_ENV_FILE = ".smolvm_env"  # the same for LocalSystem; `agent/runner.ps1` reads it
MARK = "SMOLVM_COMMAND"  # the variable that marks a command's processes
UNUSABLE = 125  # the exit code if the files of a command cannot be made
SHELLS = {
    "raw": "the guest's own shell runs the command",
    "login": "a login shell reads its profile first",
    "cmd": "cmd.exe runs the command as a batch file",
}

SOURCE = f"[ ! -r ~/{ENV_FILE} ] || . ~/{ENV_FILE}\n"


def check_command(command: object, shell: object, shells: Sequence[str] = ("raw", "login")) -> None:
    """Check a command, and the kind of its shell, which must be one of `shells`."""
    if not isinstance(command, str) or not command.strip() or "\0" in command:
        raise ConfigError(
            f"command={shown(command)} is wrong: pass the shell command as str, without NUL "
            "characters, or a program and its arguments as a list."
        )
    if encoded(command) is None:
        raise ConfigError(
            f"command={shown(command)} is wrong: it has a lone surrogate, which UTF-8 cannot "
            "encode; decode bytes with os.fsdecode(), or pass them as input=."
        )
    if shell not in shells:
        known = " or ".join(f"{name!r} ({SHELLS[name]})" for name in shells)
        raise ConfigError(f"shell={shown(shell)} is wrong in this guest: pass {known}.")


def check_words(words: object, shell: object) -> tuple[str, ...]:
    """Check a program and its arguments."""
    wrong = f"command={shown(words)} is wrong: "
    if not isinstance(words, list | tuple) or not words or not words[0]:
        raise ConfigError(f"{wrong}pass a str, or a list: a program and its arguments.")
    for word in words:
        if not isinstance(word, str) or "\0" in word or encoded(word) is None:
            raise ConfigError(f"{wrong}{shown(word)} is not a str without NUL characters.")
    if shell != "raw":
        raise ConfigError(f"shell={shown(shell)} is wrong: a list of words needs no shell.")
    return tuple(words)


def in_directory(command: str, cwd: str | None) -> str:
    """Return a command for a POSIX shell that first changes to a directory."""
    return command if cwd is None else f"cd {shlex.quote(cwd)} || exit 126\n{command}"


def check_directory(cwd: object) -> str | None:
    """Check a directory of the guest."""
    if cwd is None or (isinstance(cwd, str) and cwd and "\0" not in cwd and encoded(cwd)):
        return cwd
    raise ConfigError(f"cwd={shown(cwd)} is wrong: pass a directory of the guest as str.")


def exports(env: Mapping[str, str]) -> str:
    """Return a POSIX shell script that sets variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())


def find_marked(mark: str) -> str:
    """Return a pipeline for the shell that prints the ids of the processes with this mark.

    A shell that has just started has the mark only on its command line.
    """
    pattern = f"{MARK}=[{mark[0]}]{mark[1:]}"  # the brackets keep grep from finding itself
    return f"grep -ls '{pattern}' /proc/[0-9]*/environ /proc/[0-9]*/cmdline | cut -d/ -f3"


def signal_script(mark: str, name: str) -> str:
    """Return a script that sends a signal, such as `KILL`, to every process with this mark.

    A process that another program is just being loaded into has no environment, and a process may
    make another one meanwhile: to kill all, the script looks until it has found nothing twice.
    """
    if name != "KILL":
        return f"kill -{name} $({find_marked(mark)}) 2>/dev/null\n"
    return (
        "none=0 round=0\n"
        "while [ $none -lt 2 ] && [ $round -lt 100 ]; do\n"
        f"found=$({find_marked(mark)})\n"
        'if [ -n "$found" ]; then none=0; kill -KILL $found; else none=$((none + 1)); fi\n'
        "round=$((round + 1))\n"
        "sleep 0.02\n"
        "done 2>/dev/null\n"
    )


def parse_exports(text: str) -> dict[str, str]:
    """Return the variables that a script of `exports()` sets.

    Raises:
        ValueError: The text is not such a script.
    """
    words = shlex.split(text, posix=True)
    pairs = [word.partition("=") for word in words if word != "export"]
    return {name: value for name, _, value in pairs}
