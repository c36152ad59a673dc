"""The programs for a Windows guest: to run a command, and to remove its files.

No Windows was run. What follows is read in QEMU's source (qga/commands.c, qga/commands-win32.c) and
in GLib's; the tests run the library's side against a Linux guest with a `powershell.exe` and a
`cmd.exe` of its own.

- The agent logs the path and the arguments of each program that it starts. So `runner.ps1` gets the
  command on its standard input: lines with the name of a value, and the value in base64. PowerShell
  gets `runner.ps1` itself as base64 of UTF-16.
- A command's process inherits the agent's handles, so that the agent would wait for all children of
  the command if it captured the output. `runner.ps1` copies the output to files.
- The agent opens a file only if nobody writes to the file, and nobody can write to the file then.
  So `runner.ps1` opens a file for each piece, as the library does.
- Windows has no signals: an exit code of 0xC0000000 or more, which the agent calls a signal, is the
  code of an exception. The end of a parent is no end of its children, and children do not have the
  agent's process as their ancestor then: `taskkill /T` does not find those.
- The agent is a service, which runs as LocalSystem in session 0, without a console. PowerShell gets
  a hidden one, whose code page `runner.ps1` sets to UTF-8; children inherit the console.
"""

from __future__ import annotations

import functools
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from smolvm_async.controls.agent.system import Program
from smolvm_async.controls.commands.transport import Command
from smolvm_async.errors import UnsupportedError

KEEPS_OPEN = False
HAS_BELL = False
MAX_CONTENT = 1 << 18
# Of LocalSystem. An ordinary user can neither list the directory nor guess a name in it.
DIRECTORY = r"C:\Windows\Temp"

ENDING = ("HUP", "INT", "QUIT", "TERM", "KILL")  # the signals that kill a command

_OPTIONS = (
    *("-NoProfile", "-NonInteractive", "-ExecutionPolicy", "Bypass"),
    *("-InputFormat", "Text", "-OutputFormat", "Text", "-EncodedCommand"),
)
# The exit code is that of `exit`, else 1 if the last statement has failed, else 0.
_POWERSHELL = (
    "$ProgressPreference = 'SilentlyContinue'\n"
    "$OutputEncoding = New-Object Text.UTF8Encoding $false\n"
    "try { [Console]::OutputEncoding = $OutputEncoding } catch { }\n"
    "$input | & 'PATH'\n"
    "exit $LASTEXITCODE"
)
_EXIT = "\nif ($?) { exit 0 } elseif ($LASTEXITCODE) { exit $LASTEXITCODE } else { exit 1 }\n"
_BOM = "\ufeff"  # without it, PowerShell 5 reads a script in the guest's code page


def stem(name: str) -> str:
    """Return the path of the directory that a command's files are in."""
    return rf"{DIRECTORY}\smolvm-{name}"


def file(stem: str, name: str) -> str:
    """Return the path of one of a command's files."""
    return rf"{stem}\{name}"


def runner(command: Command, _: str, stem: str, *, has_input: bool) -> Program:
    """Return the PowerShell that runs a command with its output in files.

    The command is a PowerShell script, or a batch file if the shell is cmd.exe.
    """
    content = request(command, stem, has_input=has_input)
    return Program("powershell.exe", encoded(runner_script()), content)


def request(
    command: Command, directory: str, *, has_input: bool = False, over_ssh: bool = False
) -> bytes:
    """Return the lines that `runner.ps1` reads.

    Args:
        command: The command.
        directory: The directory for the command's files.
        has_input: Whether the standard input is in a file there, and not in `command`.
        over_ssh: Whether the output goes to the runner's own output, and not to files, and the
            runner removes the directory.
    """
    live = command.content is None and not command.detached
    source = ("parts" if over_ssh else "live") if live else "file" if has_input else "here"
    values = [("directory", directory), ("input", source)]
    values.append(("output", "session" if over_ssh else "files"))
    if command.detached:
        values.append(("detached", "yes"))
    if command.words is not None:
        values += [("program", command.words[0]), ("arguments", arguments(command.words[1:]))]
    elif command.shell == "cmd":
        script = file(directory, "command.cmd")
        # cmd.exe reads a batch file line by line, in the code page of the moment.
        lines = f"@echo off\r\nchcp 65001 >nul\r\n{crlf(command.text)}\r\n"
        values += [("script", script), ("text", lines)]
        values += [("program", "cmd.exe"), ("arguments", f'/d /c "{script}"')]
    else:
        script = file(directory, "command.ps1")
        text = f"{_BOM}{command.text}{_EXIT}"
        values += [("script", script), ("text", text), ("program", "powershell.exe")]
        values += [("arguments", arguments(encoded(_POWERSHELL.replace("PATH", script))))]
    if command.cwd is not None:
        values.append(("cwd", command.cwd))
    values += [(f"env.{name}", value) for name, value in command.env.items()]
    lines_of_values = [_line(name, value.encode(errors="replace")) for name, value in values]
    if command.content and not has_input:
        lines_of_values.append(_line("content", command.content))
    return b"".join([*lines_of_values, WHOLE])


def maker(stem: str, _: str, *, live: bool) -> Program:
    """Return the PowerShell that makes the directory, and empty `in` and `end`."""
    content = _line("directory", stem.encode()) + _line("input", b"empty") + WHOLE
    return Program("powershell.exe", encoded(runner_script()), content)


def check_signal(name: str) -> None:
    """Check that a signal ends programs: Windows has no others.

    Raises:
        UnsupportedError: The signal does not end programs.
    """
    if name not in ENDING:
        message = f"a Windows guest has no SIG{name}."
        raise UnsupportedError(message, hint="To end the process, use terminate() or kill().")


def signaller(_: str, pid: int, name: str) -> Program:
    """Return the program that kills a process and its descendants, which no signal can reach."""
    check_signal(name)
    # The filter spares a process that got the number after the command's end.
    filtered = ["/fi", f"PID eq {pid}", "/fi", "IMAGENAME eq powershell.exe"]
    return Program("taskkill.exe", ["/t", "/f", *filtered])


def remover(stems: Sequence[str]) -> Program:
    """Return the program that removes the files of commands."""
    return Program("cmd.exe", ["/d", "/c", "rmdir", "/s", "/q", *stems])


def exit_code(code: int, *, signal: bool) -> int:  # the agent's name for high ones
    """Return the exit code as Windows has it: 0 to 0xFFFFFFFF."""
    return code & 0xFFFFFFFF


def crlf(text: str) -> str:
    """Return a text with the line ends of Windows: cmd.exe may jump into the middle of a line."""
    return re.sub(r"\r?\n", "\r\n", text)


def arguments(words: Sequence[str]) -> str:
    """Return the command line that the C library of Windows splits into these words."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if word and not re.search(r'[\s"]', word):
        return word
    # Backslashes are doubled only before a quote, and before the quote at the end.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', word)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def _line(name: str, value: bytes) -> bytes:
    return f"{name} {b64encode(value).decode()}\n".encode()


WHOLE = _line("whole", b"yes")  # the last line: the runner ignores a request that is cut


def encoded(script: str) -> list[str]:
    """Return PowerShell's arguments for a script."""
    return [*_OPTIONS, b64encode(script.encode("utf-16-le")).decode()]


@functools.cache
def runner_script() -> str:
    """Return `runner.ps1` without comments and indentation: a command line has an end."""
    text = Path(__file__).with_name("runner.ps1").read_text()
    lines = [line.strip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("#"))
