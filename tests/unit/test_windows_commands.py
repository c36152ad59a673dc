"""The programs for a Windows guest, by its agent or over SSH, which no test can run on Windows."""

from __future__ import annotations

import base64
import re

import pytest

from smolvm_async.controls.agent import windows
from smolvm_async.controls.agent.system import Program
from smolvm_async.controls.commands.transport import Command
from smolvm_async.controls.ssh import windows as over_ssh

LONGEST = 32_767  # characters of a command line of Windows
LONGEST_OF_CMD = 8191  # characters of a line for cmd.exe
SECRET = "very-secret"


def runner(text: str = "dir", **options: object) -> Program:
    command = Command(text, "raw", {}, b"")._replace(**options)  # type: ignore[arg-type]
    return windows.runner(command, "mark", windows.stem("name"), has_input=False)


def values(program: Program) -> dict[str, str]:
    lines = [line.split(" ") for line in program.content.decode().splitlines()]
    return {name: base64.b64decode(value).decode() for name, value in lines}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["a", "b"], "a b"),
        (["", "a b", "a\tb"], '"" "a b" "a\tb"'),
        (['a"b', '"'], r'"a\"b" "\""'),
        (["a\\b", "a\\", "a b\\"], r'a\b a\ "a b\\"'),
        (['a\\"b', 'a\\\\"'], r'"a\\\"b" "a\\\\\""'),
        (["%PATH%", "$x", "a^b", "é😀"], "%PATH% $x a^b é😀"),
    ],
)
def test_arguments_are_quoted_as_the_c_library_splits_them(words: list[str], line: str) -> None:
    assert windows.arguments(words) == line


def test_a_command_line_is_short_and_has_nothing_of_the_command() -> None:
    for options in ({}, {"shell": "cmd"}, {"words": ("a.exe", SECRET)}):
        program = runner(SECRET, env={"V": SECRET}, content=SECRET.encode(), **options)
        line = " ".join([program.path, *program.arguments])
        assert len(line) < LONGEST
        script = base64.b64decode(program.arguments[-1]).decode("utf-16-le")
        assert SECRET not in line + script
        assert len(values(program)["arguments"]) < LONGEST


def test_a_line_for_an_ssh_server_has_nothing_of_the_command_and_nothing_special() -> None:
    for shell in ("cmd", "powershell"):
        line = over_ssh.line(shell, "mark")
        assert len(line) < LONGEST_OF_CMD
        assert ("$input" in line) == (shell == "powershell")
    killer = over_ssh.signaller("mark", "KILL")
    for line in (over_ssh.line("cmd", "mark"), killer, over_ssh.clock_setter(1.5)):
        assert len(line) < LONGEST_OF_CMD
        assert re.fullmatch(r"[\w .+/=-]+", line, re.ASCII)
    # It finds the command by its command line, and never itself.
    script = base64.b64decode(killer.split()[-1]).decode("utf-16-le")
    marked = over_ssh.line("cmd", "mark").split()[-1]
    assert marked in script
    assert marked not in killer
    assert windows.stem("mark") in script
    assert over_ssh.shell_of(b"C:\\Windows\\System32\\WindowsPowerShell\\v1.0\r\n") == "powershell"
    assert over_ssh.shell_of(b"$PSHOME\r\n") == over_ssh.shell_of(b"\n") == "cmd"


def test_the_input_over_ssh_is_the_runner_and_the_command() -> None:
    command = Command("dir", "raw", {"V": "é"}, b"\xff", r"C:\x")
    first, *rest = over_ssh.content(command, "mark").splitlines()
    assert base64.b64decode(first).decode() == windows.runner_script()
    found = dict(line.split(b" ") for line in rest)
    kept = {name.decode(): base64.b64decode(value) for name, value in found.items()}
    assert (kept["content"], kept["env.V"], kept["cwd"]) == (b"\xff", "é".encode(), rb"C:\x")
    assert (kept["output"], kept["directory"].decode()) == (b"session", windows.stem("mark"))
    assert rest[-1].startswith(b"whole ")  # a lost connection starts no part of a command


def test_a_request_that_is_cut_can_be_told_from_a_whole_one() -> None:
    for program in (runner(content=b"x"), windows.maker("stem", "mark", live=True)):
        *others, last = values(program)
        assert (last, "whole" in others) == ("whole", False)


def test_a_script_is_utf_8_for_powershell_and_for_cmd() -> None:
    powershell, cmd = values(runner("é\n$x")), values(runner("é\nb\r\nc", shell="cmd"))
    assert powershell["text"].startswith("\ufeffé\n$x\nif ($?)")
    assert powershell["program"] == "powershell.exe"
    inner = base64.b64decode(powershell["arguments"].split()[-1]).decode("utf-16-le")
    assert f"& '{powershell['script']}'" in inner
    assert cmd["text"] == "@echo off\r\nchcp 65001 >nul\r\né\r\nb\r\nc\r\n"
    assert (cmd["program"], cmd["arguments"]) == ("cmd.exe", f'/d /c "{cmd["script"]}"')


def test_an_exit_code_has_32_bits_and_no_sign() -> None:
    assert windows.exit_code(3, signal=False) == 3
    assert windows.exit_code(-1, signal=False) == 0xFFFFFFFF
    assert windows.exit_code(-0x3FFFFFFB, signal=True) == 0xC0000005
