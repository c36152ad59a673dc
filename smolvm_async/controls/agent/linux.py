"""The shell programs for a Linux guest: to run a command, and to make its files.

The agent logs the path and the arguments of each program that it starts, and each user of the guest
can read command lines. So `/bin/sh` gets its program on standard input, and neither the command nor
its variables are in an argument or in a file.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from smolvm_async.controls.agent.system import Program
from smolvm_async.controls.commands.script import (
    MARK,
    SOURCE,
    UNUSABLE,
    exports,
    in_directory,
    signal_script,
)
from smolvm_async.controls.commands.transport import Command

SHELL = "/bin/sh"
KEEPS_OPEN = True
HAS_BELL = True
MAX_CONTENT = 0  # the shell has its program there
DIRECTORY = "/tmp"  # `_EXCLUSIVE` makes each file, with a random name

FILES = ("in", "end", "bell", "pipe", "out", "err")

_EXCLUSIVE = "umask 077\nset -C\n"  # only the owner can read a file, and nobody has made it before
_USUAL = "umask 022\nset +C\n"
# A service of the system has no HOME. `id` would take a millisecond: only root owns /root.
_HOME = '[ -n "$HOME" ] || { [ -O /root ] && HOME=/root || HOME=/; }\nexport HOME\ncd\n'
_PROFILES = 'for file in /etc/profile ~/.profile; do [ ! -r "$file" ] || . "$file"; done\n'


def stem(name: str) -> str:
    """Return the path of a command's files without their endings."""
    return f"{DIRECTORY}/smolvm-{name}"


def file(stem: str, name: str) -> str:
    """Return the path of one of a command's files."""
    return f"{stem}.{name}"


def runner(command: Command, mark: str, stem: str, *, has_input: bool) -> Program:
    """Return the shell that runs a command with its output in files."""
    text = in_directory(command.text, command.cwd)
    source, feeder = f"{stem}.in" if has_input else "/dev/null", ""
    files = f">{stem}.out 2>{stem}.err"
    if command.detached:
        files = ">/dev/null 2>&1"
    elif command.content is None:
        source, feeder = f"{stem}.pipe", _feeder(mark, stem)
    profiles = _PROFILES if command.shell == "login" else ""
    # The shell reads up to the closing brace first: in the braces, its own input changes.
    return _shell(
        f"{{\n{_EXCLUSIVE}{feeder}exec <{source} {files} || exit {UNUSABLE}\n{_USUAL}shift\n"
        f"{_HOME}{profiles}export {MARK}={mark}\n{SOURCE}{exports(command.env)}"
        f"eval {shlex.quote(text)}\nexit\n}}\n",
        mark,
    )


def _feeder(mark: str, stem: str) -> str:
    """Return the part of a program that passes on the growing file `in`, until its end.

    The library writes the input into no pipe: the agent would lose what does not fit. It rings a
    `bell`, a pipe, after each part and after the end, which is in the file `end`. A ring is lost
    before the feeder has opened the bell, so the feeder looks at the files first. Each `cat` goes
    on where the one before has stopped. The bell also rings when the command has ended.
    """
    return (
        f"mkfifo {stem}.pipe || exit {UNUSABLE}\n"
        "(\n"
        "trap '' HUP INT QUIT ALRM TERM USR1 USR2\n"  # these are for the command
        f"export {MARK}={mark}\n"
        f"exec 3<{stem}.in 4<>{stem}.bell >{stem}.pipe 2>/dev/null\n"
        "(while [ -e /proc/$$ ]; do sleep 1; done; echo >&4) >/dev/null &\n"
        f"while cat <&3 && [ ! -s {stem}.end ] && [ -e /proc/$$ ]; do read -r ring <&4; done\n"
        "cat <&3\n"
        ") &\n"
    )


def maker(stem: str, mark: str, *, live: bool) -> Program:
    """Return the program that makes an empty `in`, and for live input `end` and the `bell`."""
    more = f": >{stem}.end\nmkfifo {stem}.bell\n" if live else ""
    return _shell(f"{_EXCLUSIVE}: >{stem}.in\n{more}", mark)


def remover(stems: Sequence[str]) -> Program:
    """Return the program that removes the files of commands."""
    files = [file(stem, name) for stem in stems for name in FILES]
    return Program("/bin/rm", ["-f", *files])


def exit_code(code: int, *, signal: bool) -> int:
    """Return the exit code as in `subprocess`."""
    return -code if signal else code


def _shell(program: str, mark: str) -> Program:
    """Return a shell that reads its program; a process has the mark before the program begins."""
    return Program(SHELL, ["-s", f"{MARK}={mark}"], program.encode(errors="surrogateescape"))


def signaller(mark: str, _: int, name: str) -> Program:
    """Return the program that sends a signal to every process of a command."""
    return _shell(signal_script(mark, name), "")  # with a mark, the program would find itself
