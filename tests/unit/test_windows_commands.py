"""The programs for a Windows guest's agent, which no test can run on Windows."""

from __future__ import annotations

import base64

import pytest

from smolvm_async.controls.agent import windows
from smolvm_async.controls.agent.system import Program
from smolvm_async.controls.commands.transport import Command

LONGEST = 32_767  # characters of a command line of Windows
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
