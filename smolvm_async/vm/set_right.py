"""Set a clone right before anybody uses it: random numbers first, then clock, name and keys.

Without help, clones draw the same random numbers for up to 20 seconds: keys, tokens and UUIDs of
one sandbox would be another's. A guest with a driver for vmgenid (Linux 5.18, Windows 10) reseeds
its pool some milliseconds after it was restored, since each clone has another generation id. The
library does not rely on this where it can reach the guest:

- In the built-in Debian, a parked process waits for one message (see `qemu/parked.py`).
- In other Linux guests, a script does the same over SSH. The first login uses the keys of the
  snapshot, all later logins the clone's own.
- In Linux guests that are reached through their agent, the agent runs this script, without keys.
- In Windows guests, the agent sets the clock. For random numbers, they have only the new generation
  id. No Windows was run.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.login import Login
from smolvm_async.controls.ssh.script import as_root
from smolvm_async.errors import ConnectionLostError, SmolVMError
from smolvm_async.foundation.log import get_logger
from smolvm_async.qemu.parked import ENDED, Parked

if TYPE_CHECKING:
    from asyncssh import SSHClientConnection

    from smolvm_async.controls.agent.session import Session

logger = get_logger(__name__)

SEED = 64  # bytes; the pool of Linux has 32
RANDOM = 3  # the script's exit status if only the random numbers could not be reseeded
PATIENCE = 30.0  # seconds for a guest's agent; usually, this takes 0.1 s
QUOTED = 300  # characters of the guest's answer in a warning
SCRIPT = "set_right.sh"
NOT_RESEEDED = (
    "the clone's random numbers could not be reseeded, so it may draw the same numbers as other "
    "clones of the snapshot until its kernel reseeds itself: %s"
)
NOT_REACHED = (
    "the library cannot reach this guest OS to reseed the clone's random numbers: the guest has to "
    "do so itself, by a driver for vmgenid, as Windows 10 and Linux 5.18 have"
)


class Clone:
    """A clone that at first has the login of the VM that the snapshot was taken of.

    Attributes:
        login: The login that the guest accepts now.
        is_right: Whether `set_right()` has ended, even if it failed.
    """

    def __init__(
        self, vm_id: str, link: Link, parked: Parked | None, before: Login, own: Login
    ) -> None:
        self.login = before
        self.is_right = False
        self._vm_id = vm_id
        self._link = link
        self._parked = parked
        self._own = own

    async def set_right(self, timeout: float) -> None:
        """Set the clone right, or log a warning; the parked process has `timeout` seconds."""
        if self._parked is not None:
            keys = (self._own.host_key.private, f"{self._own.key.public}\n".encode())
            problem, done = await self._parked.set_right(self._vm_id, *keys, timeout=timeout)
        else:
            problem, done = await self._set_right_over_ssh()
        self.is_right = True
        if done:
            self.login = self._own
        if problem and problem != ENDED:
            logger.warning(NOT_RESEEDED, problem)

    async def _set_right_over_ssh(self) -> tuple[str, bool]:
        """Run the script; return the problem, if any, and whether the guest has the new login."""
        values = {**message(self._vm_id, self._own), "old_key": self.login.key.public}
        script = files(__package__).joinpath(SCRIPT).read_text()

        async def run(connection: SSHClientConnection) -> Any:
            # The secrets are only on the input.
            return await connection.run(as_root(script), input=_assignments(values), encoding=None)

        try:
            async with self._link.apart(run) as result:
                pass
        except (ConnectionLostError, OSError) as error:
            return str(error), False
        finally:
            self._link.abort()  # the next connection uses the new keys
        said = (result.stderr or b"").decode(errors="replace")[-QUOTED:].strip()
        done = result.exit_status in (0, RANDOM)
        return "" if result.exit_status == 0 else said or "the connection was lost", done


async def set_right_through_agent(vm_id: str, session: Session, os: str) -> None:
    """Set a clone right that has no login, or log a warning."""
    from smolvm_async.controls.agent.clock import advance_clock
    from smolvm_async.controls.agent.execution import AgentTransport
    from smolvm_async.controls.clock import PROBLEM
    from smolvm_async.controls.commands.query import query

    present = await session.agent.present()
    if os != "linux" or not present:
        logger.warning(NOT_REACHED)
    if not present:
        return
    values = {"seed": secrets.token_hex(SEED), "time": time.time(), "hostname": vm_id}
    script = files(__package__).joinpath(SCRIPT).read_text()
    try:
        async with session.pauses.timeout(PATIENCE):
            if os != "linux":
                problem = await advance_clock(session.agent)
            else:
                answer = await query(AgentTransport(session), script, {}, _assignments(values))
                problem = answer.reason[-QUOTED:] if answer.exit_code else ""
    except SmolVMError as error:
        problem = error.message
    except TimeoutError:
        problem = f"no answer within {PATIENCE:g} s"
    if problem:
        logger.warning(NOT_RESEEDED if os == "linux" else PROBLEM, problem)


def _assignments(values: Mapping[str, object]) -> bytes:
    """Return the input of the script."""
    return "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items()).encode()


def message(vm_id: str, login: Login) -> dict[str, Any]:
    """Return the variables of the script."""
    return {
        "seed": secrets.token_hex(SEED),
        "time": time.time(),
        "hostname": vm_id,
        "authorized_keys": login.key.public,
        "host_key": login.host_key.private.decode(),
        "host_key_public": login.host_key.public,
    }
