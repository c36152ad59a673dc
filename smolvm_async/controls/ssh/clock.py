"""The clock of a guest, set over SSH."""

from __future__ import annotations

import time

from smolvm_async.controls.ssh.execution import run_apart
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.script import as_root
from smolvm_async.errors import ConnectionLostError

QUOTED = 200  # characters of the guest's answer in a warning


async def advance_clock(link: Link, *, windows: bool) -> str:
    """Set the guest's clock to the host's. Return the reason if this failed; otherwise empty."""
    said = bytearray()
    line = script
    if windows:
        from smolvm_async.controls.ssh.windows import clock_setter as line
    try:
        setting = await run_apart(link, lambda: line(time.time()), said.extend)
    except (ConnectionLostError, OSError) as error:
        return str(error)
    if setting.exit_code == 0:
        return ""
    return said.decode(errors="replace")[-QUOTED:].strip() or "the connection was lost"


def script(now: float) -> str:
    """Return a script that sets the clock, as root, unless the clock shows `now` or later.

    A slow guest may run the script late. So the script never turns the clock back. A `date` that
    is not GNU's may refuse fractions of a second.
    """
    to_set = (
        f'[ "$(date +%s)" -ge {int(now)} ] || date -s @{now:.3f} >/dev/null '
        f"|| date -s @{int(now)} >/dev/null"
    )
    return as_root(to_set)
