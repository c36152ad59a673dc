r"""The lines for the SSH server of a Windows guest: to run a command, and to kill a command.

A command is what it is through the agent: the values for `runner.ps1` (see `agent/windows.py`) on
the standard input of PowerShell. The first line of the input is `runner.ps1` itself, since cmd.exe
takes at most 8191 characters. The command inherits the session's output. No Windows was run; this
is read in the source and the documentation of Win32-OpenSSH, and in its issues:

- The server gives the line to cmd.exe, or to the registry's `DefaultShell` (wiki, "DefaultShell").
  PowerShell as that shell reads the standard input itself, so its `$input` has to be passed on, and
  ends with 0 or 1 unless it is told to `exit` with the code. Neither quotes nor other special
  characters are in the line for cmd.exe.
- The end of a session does not end its processes (issue 1751). All of them are in a job, which ends
  with the shell (issues 1195 and 2452): so `taskkill` of the shell also ends children whose parent
  has ended, and nothing that a command has left behind keeps the session open.
- An exit code has 32 bits without a sign, as the protocol's exit status has.
- A session runs in session 0, as services do: no window is on the desktop. An administrator has all
  rights in it; the keys of administrators are in `administrators_authorized_keys` (issue 1942).
- An ordinary user can make a directory in `C:\Windows\Temp`, too, and own it.
- `sftp-server` takes the paths `C:/x` and `/C:/x` for the same file, starts in the user's profile,
  has no owners and modes, and replaces a file by MoveFileEx since 8.1 (openssh-portable, pull
  request 438); before, the file is missing for a moment.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Final

from smolvm_async.controls.agent.windows import (
    check_signal,
    encoded,
    request,
    runner_script,
    stem,
)
from smolvm_async.controls.commands.transport import Command

# cmd.exe prints the name, PowerShell the value, and a POSIX shell nothing.
QUESTION: Final = "echo $PSHOME"

# All input comes before PowerShell runs the statements.
_BOOTSTRAP = (
    "$runner, $values = @($input)\n"
    "$text = [Text.Encoding]::UTF8.GetString([Convert]::FromBase64String($runner))\n"
    "$values | & ([ScriptBlock]::Create($text))\n"
    "# MARK"
)
# The handles of processes that were killed are closed a moment later.
_KILLER = (
    "$ErrorActionPreference = 'SilentlyContinue'\n"
    "$filter = \"CommandLine LIKE '%MARK%'\"\n"
    "foreach ($process in Get-CimInstance Win32_Process -Filter $filter) {\n"
    "taskkill.exe /t /f /pid $process.ProcessId\n"
    "}\n"
    "for ($again = 0; $again -lt 50 -and [IO.Directory]::Exists('DIRECTORY'); $again++) {\n"
    "if ($again) { Start-Sleep -Milliseconds 100 }\n"
    "[IO.Directory]::Delete('DIRECTORY', $true)\n"
    "}"
)


def shell_of(answer: bytes) -> str:
    """Return the kind of the shell that has answered the `QUESTION`: `powershell` or `cmd`."""
    return "powershell" if b"\\" in answer and b"$PSHOME" not in answer else "cmd"


def line(shell: str, mark: str) -> str:
    """Return the line that runs a command, whose `content()` is on the standard input."""
    program = _program(_BOOTSTRAP.replace("MARK", mark))
    return f"$input | {program}; exit $LASTEXITCODE" if shell == "powershell" else program


def content(command: Command, mark: str) -> bytes:
    """Return the standard input of a command's line."""
    runner = b64encode(runner_script().encode()) + b"\n"
    return runner + request(command, stem(mark), over_ssh=True)


def directory(mark: str) -> str:
    """Return the path of a command's directory for SFTP."""
    return stem(mark).replace("\\", "/")


def signaller(mark: str, name: str) -> str:
    """Return the line that kills a command and removes its files: no other signal is there.

    Raises:
        UnsupportedError: This signal ends no program.
    """
    check_signal(name)
    marked = encoded(_BOOTSTRAP.replace("MARK", mark))[-1]
    return _program(_KILLER.replace("MARK", marked).replace("DIRECTORY", stem(mark)))


def clock_setter(now: float) -> str:
    """Return the line that sets the clock, unless the clock shows `now` or later.

    Only an administrator may set the clock.
    """
    return _program(
        "$ErrorActionPreference = 'Stop'\n"
        f"$now = [DateTimeOffset]::FromUnixTimeMilliseconds({now * 1000:.0f}).LocalDateTime\n"
        "if ((Get-Date) -lt $now) { [void](Set-Date $now) }"
    )


def _program(script: str) -> str:
    return " ".join(["powershell.exe", *encoded(script)])
