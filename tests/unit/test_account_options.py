"""The command line's options for an account in a guest image."""

from __future__ import annotations

import os
import pty
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from smolvm_async.cli.account import password_given


@pytest.fixture
def stdin() -> Iterator[int]:
    """The other end of this process's stdin, which is a pipe."""
    kept, (reader, writer) = os.dup(0), os.pipe()
    os.dup2(reader, 0)
    os.close(reader)
    yield writer
    os.dup2(kept, 0)
    os.close(kept)
    os.close(writer)


@pytest.mark.parametrize("content", ["pass wörd", "pass wörd\n", "pass wörd\r\nmore\n"])
def test_a_password_is_the_first_line_of_a_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "file").write_bytes(content.encode())
    assert password_given(str(tmp_path / "file")) == "pass wörd"
    assert password_given(None) is None


def test_the_rest_of_stdin_stays_for_a_command(stdin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", os.fdopen(0, closefd=False))
    os.write(stdin, b"secret\nfor the command")
    assert password_given("-") == "secret"
    assert os.read(0, 100) == b"for the command"


def test_a_terminal_asks_without_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    with os.fdopen(child, "r+b", buffering=0) as terminal:
        monkeypatch.setattr("sys.stdin", os.fdopen(terminal.fileno(), closefd=False))
        monkeypatch.setattr("getpass.getpass", lambda prompt: f"typed after {prompt}")
        assert password_given("-") == "typed after Password: "
    os.close(parent)


@pytest.mark.parametrize("content", [None, b"", b"\nsecond\n", b"\xff\n"])
def test_a_file_without_a_password_is_told(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(typer.BadParameter, match=r"file' cannot be read|first line of .*empty"):
        password_given(str(tmp_path / "file"))
