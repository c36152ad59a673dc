"""The options for the account with which commands and files reach a guest over SSH.

A password is never an argument: other users of this host can read command lines.
"""

from __future__ import annotations

import getpass
import os
import sys
from typing import Annotated

import typer

STDIN = 0
MOST = 1 << 12  # bytes of a password
HINT = "--password-file"

User = Annotated[
    str | None,
    typer.Option(
        "--user",
        metavar="NAME",
        help="The user who logs in over SSH: root, or a user with sudo that cloud-init makes; for "
        "Windows, with --key or --password-file, a user of the image.",
        show_default="root; Administrator for Windows",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="FILE",
        help="The user's private key, for a Windows image that has OpenSSH and no agent.",
    ),
]
PasswordFile = Annotated[
    str | None,
    typer.Option(
        "--password-file",
        metavar="FILE",
        help="A file whose first line is the user's password, for a Windows image that has OpenSSH "
        "and no agent; with -, the first line of stdin, or a question in the terminal.",
    ),
]


def password_given(file: str | None) -> str | None:
    """Return the password that the option `--password-file` leads to.

    The rest of stdin stays for a command in the guest.
    """
    if file is None:
        return None
    try:
        if file != "-":
            with open(file, "rb") as opened:
                line = opened.readline(MOST)
        elif sys.stdin.isatty():
            line = getpass.getpass("Password: ").encode()
        else:
            line = _first_line_of_stdin()
        password = line.decode().rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file!r} cannot be read: {error}", param_hint=HINT) from error
    if not password:
        raise typer.BadParameter(f"the first line of {file!r} is empty", param_hint=HINT)
    return password


def _first_line_of_stdin() -> bytes:
    line = b""
    while len(line) < MOST and not line.endswith(b"\n") and (byte := os.read(STDIN, 1)):
        line += byte
    return line
