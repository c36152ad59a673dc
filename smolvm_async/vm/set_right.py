"""Set a clone right before anybody uses it: random numbers first, then clock, name and keys.

Without help, clones draw the same random numbers for up to 20 seconds: keys, tokens and UUIDs of
one sandbox would be another's. A guest with a driver for vmgenid (Linux 5.18, Windows 10) reseeds
its pool some milliseconds after it was restored, since each clone has another generation id. The
library does not rely on this where it can reach the guest:

- In the built-in Debian, a parked process waits for one message (see `qemu/parked.py`).
- In other Linux guests, a script does the same over SSH. The first login uses the keys of the
  snapshot, all later logins the clone's own.
- Windows gets only the new generation id, until commands go through the guest agent.
"""

from __future__ import annotations

import secrets
import shlex
import time
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.login import Login
from smolvm_async.errors import ConnectionLostError
from smolvm_async.foundation.log import get_logger

if TYPE_CHECKING:
    from asyncssh import SSHClientConnection

logger = get_logger(__name__)

SEED = 64  # bytes; the pool of Linux has 32
QUOTED = 300  # characters of the guest's answer in a warning
SCRIPT = "set_right.sh"
NOT_RESEEDED = (
    "the clone's random numbers could not be reseeded, so it may draw the same numbers as other "
    "clones of the snapshot until its kernel reseeds itself: %s"
)


def message(vm_id: str, login: Login) -> dict[str, Any]:
    """Return what a clone has to know; the values may be written to files with a line break."""
    return {
        "seed": secrets.token_hex(SEED),
        "time": time.time(),
        "hostname": vm_id,
        "authorized_keys": login.key.public,
        "host_key": login.host_key.private.decode(),
        "host_key_public": login.host_key.public,
    }


async def set_right_over_ssh(link: Link, vm_id: str, before: Login, login: Login) -> str:
    """Set a Linux guest right with a script; return the reason if this failed, otherwise empty.

    Args:
        link: The connection, which still logs in with the keys of `before`.
        login: The clone's own keys.
    """
    values = {**message(vm_id, login), "old_key": before.key.public}
    lines = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items())
    script = files(__package__).joinpath(SCRIPT).read_text()
    as_root = f'[ "$(id -u)" = 0 ] || exec sudo -n sh -c {shlex.quote(script)}\n{script}'

    async def run(connection: SSHClientConnection) -> Any:
        command = f"exec sh -c {shlex.quote(as_root)}"  # the secrets are only on the input
        return await connection.run(command, input=lines.encode(), encoding=None)

    try:
        async with link.apart(run) as result:
            pass
    except (ConnectionLostError, OSError) as error:
        return str(error)
    if result.exit_status == 0:
        return ""
    said = (result.stderr or b"").decode(errors="replace")[-QUOTED:].strip()
    return said or "the connection was lost"
