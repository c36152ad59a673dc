"""Memory as the kernel shares it out: PSS, from `/proc/PID/smaps_rollup`."""

from __future__ import annotations

import os
import re
from pathlib import Path


def pss(pid: int) -> float:
    """MiB of a process: what is its own, and its share of what it shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"(?m)^Pss: +(\d+) kB$", text)
    assert found is not None, text
    return int(found[1]) / 1024


def own_pss() -> float:
    """MiB of this process."""
    return pss(os.getpid())
