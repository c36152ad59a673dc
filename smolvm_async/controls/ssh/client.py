"""A login to a guest's SSH server, by asyncssh."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from smolvm_async.controls.ssh.login import Access
from smolvm_async.errors import LoginError
from smolvm_async.foundation.tasks import in_background, no_collection
from smolvm_async.state.names import KNOWN_HOST

if TYPE_CHECKING:
    from asyncssh import SSHClientConnection

# The ciphers of OpenSSH and of dropbear, the cheapest for an emulated processor first.
CIPHERS = ["aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes128-ctr"]

# asyncssh looks up this process's user, although our logins do not use the result. In containers,
# a user id often has no entry in the password file; asyncssh then needs these variables.
ACCOUNT = {"HOME": "/nonexistent", "LOGNAME": "nobody"}
_logins = 0  # logins in progress that need the variables
_added: list[str] = []


@contextmanager
def _account() -> Iterator[None]:
    """Set the missing variables of `ACCOUNT` while a login is in progress, if they are needed."""
    global _logins, _added
    if not _logins:
        _added = [name for name in ACCOUNT if name not in os.environ and not _has_account()]
        os.environ.update({name: ACCOUNT[name] for name in _added})
    _logins += 1
    try:
        yield
    finally:
        _logins -= 1
        if not _logins:
            for name in _added:
                os.environ.pop(name, None)


def _has_account() -> bool:
    import pwd

    try:
        return bool(pwd.getpwuid(os.getuid()))
    except KeyError:
        return False


async def import_asyncssh() -> None:
    """Import asyncssh in a thread, since the import takes 0.3 s."""
    if "asyncssh" not in sys.modules:
        await in_background(no_collection()(importlib.import_module), "asyncssh")


async def log_in(ours: socket.socket, access: Access, keepalive: int) -> SSHClientConnection:
    """Log in through a socket to the server; send keep-alives after `keepalive` seconds."""
    await import_asyncssh()
    import asyncssh

    keys = [asyncssh.import_private_key(access.private_key)] if access.private_key else None
    host_key = access.host_key and asyncssh.import_public_key(access.host_key)
    known: Any = ([host_key], [], []) if host_key else None
    with _account():
        return await asyncssh.connect(
            sock=ours,
            username=access.user,
            client_keys=keys,
            password=access.password or None,
            known_hosts=known,
            config=None,
            agent_path=None,
            preferred_auth="publickey,password",
            encryption_algs=CIPHERS,
            compression_algs=["none"],
            login_timeout=0,  # the caller has a deadline, which stands still during a pause
            keepalive_interval=keepalive,
        )


# The reason and the cure if no key of an administrator works: Win32-OpenSSH, issue 1942.
ADMINISTRATORS = (
    " Windows looks for keys of administrators only in C:\\ProgramData\\ssh\\"
    "administrators_authorized_keys, to which nobody but administrators and SYSTEM may have access."
)


def find_refusal(error: BaseException, access: Access) -> LoginError | None:
    """Return the error for a server that refuses the login or is another one; else `None`."""
    import asyncssh

    if isinstance(error, asyncssh.PermissionDenied):
        given = "key=" if access.private_key else "password="
        hint = f"Check user= and {given}." + (ADMINISTRATORS if access.private_key else "")
        message = f"the guest's SSH server refuses the login of {access.user!r} with {given}."
        return LoginError(message, hint=hint)
    if isinstance(error, asyncssh.HostKeyNotVerifiable) or (
        isinstance(error, asyncssh.KeyExchangeFailed) and access.host_key
    ):
        return LoginError(
            "the guest's SSH server has another host key than at the first login.",
            hint=f"If you changed the image, remove {KNOWN_HOST!r} in the VM's directory.",
        )
    return None
