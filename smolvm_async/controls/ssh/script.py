"""The scripts for an SSH server: to run a command with its variables, and to kill a command."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping

from smolvm_async.controls.commands.script import MARK, SOURCE, exports, find_marked, signal_script


def script(
    command: str, shell: str, env: Mapping[str, str], mark: str, *, terminal: bool = False
) -> tuple[str, bytes]:
    """Return the script for the SSH server, and the bytes to send first on its standard input.

    Every process of the command has `mark` in its environment, so that `signaller()` finds them
    all.

    The values of `env` are only on the input, since every user of the guest can read a command
    line. The shell's `read` reads single bytes, so it leaves the rest of the input to the command.
    A `terminal`, which must not echo yet, would interpret control characters and cut long lines: it
    gets short lines of printable characters.
    """
    if shell == "login":
        command = f'exec "$SHELL" -lc {shlex.quote(command)}'
    source = f"export {MARK}={mark}\n{SOURCE}"
    echo = "stty echo\n" if terminal else ""
    if not env:
        return f"{source}{echo}{command}", b""
    end = secrets.token_hex(16)
    content = exports(env).encode(errors="surrogateescape")
    line_end, evaluate = "\n", 'eval "$smolvm_env"'
    if terminal:
        content = _in_octal(content)
        line_end, evaluate = "", f"""eval "$(printf '%b' "$smolvm_env")"\n{echo}"""
    reader = (
        "smolvm_env=\n"
        f'while IFS= read -r smolvm_line && [ "$smolvm_line" != {end} ]; do\n'
        f'smolvm_env="$smolvm_env$smolvm_line{line_end}"\n'
        "done\n"
        f"{evaluate}\n"
        "unset smolvm_env smolvm_line\n"
    )
    return f"{source}{reader}{command}", content + f"{end}\n".encode()


def _in_octal(content: bytes) -> bytes:
    """Return short lines, of which `printf %b` makes the content."""
    lines = (content[start : start + 100] for start in range(0, len(content), 100))
    return b"".join(b"".join(b"\\0%03o" % byte for byte in line) + b"\n" for line in lines)


def signaller(mark: str, name: str) -> str:
    """Return a script that sends a signal, such as `KILL`, to every process of a `script()`.

    SSH can send signals, but OpenSSH refuses to do so for root, and the signal would not reach a
    process that has left the command's process group.
    """
    with_sudo = _tree_signaller(find_marked(mark), name)
    return f"{signal_script(mark, name)}{_AS_ROOT} sudo -n sh -c {shlex.quote(with_sudo)}"


def as_root(posix_script: str) -> str:
    """Return a command that runs a script as root, if need be with sudo."""
    sudo = f'[ "$(id -u)" = 0 ] || exec sudo -n sh -c {shlex.quote(posix_script)}'
    # The user's own shell may not be a POSIX shell.
    whole = f"{sudo}\n{posix_script}"
    return f"exec sh -c {shlex.quote(whole)}"


# Only root may kill processes that a user started with sudo, and read the mark of sudo itself.
_AS_ROOT = '[ "$(id -u)" = 0 ] || ! grep -qsx sudo /proc/[0-9]*/comm ||'


def _tree_signaller(find: str, name: str) -> str:
    """Return a script that reaches also all descendants: sudo removed the mark from them."""
    parents = "^PPid:.($(echo $next | tr ' ' '|'))\\$"
    return (
        f"all=; next=$({find})\n"
        'while [ -n "$next" ]; do\n'
        'all="$all $next"\n'
        f'next=$(grep -lsE "{parents}" /proc/[0-9]*/status | cut -d/ -f3)\n'
        "done\n"
        f"kill -{name} $all 2>/dev/null"
    )
