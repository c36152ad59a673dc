"""The memory and processor time that processes of this host use."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from smolvm_async.foundation.process import Identity, stat_fields

MIB = 1 << 20


class Usage(NamedTuple):
    """The use of some processes together.

    Attributes:
        processor_time: Seconds of one processor.
        resident: MiB of memory. The memory that several processes share counts for each of them.
        uptime: Seconds since the first of them started.
    """

    processor_time: float
    resident: int
    uptime: float

    @property
    def processors(self) -> float:
        """The number of processors that they have used on average."""
        return self.processor_time / self.uptime if self.uptime > 0 else 0.0


def read_usage(processes: Iterable[Identity], proc: Path = Path("/proc")) -> Usage | None:
    """Return the use of the processes that run; `None` if none of them runs."""
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    ticks = pages = 0
    starts = []
    for process in processes:
        try:
            text = (proc / str(process.pid) / "stat").read_text()
        except OSError:
            continue
        fields = stat_fields(text)
        if int(fields[19]) == process.started and fields[0] not in "ZX":
            ticks += int(fields[11]) + int(fields[12])
            pages += int(fields[21])
            starts.append(process.started)
    if not starts:
        return None
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME) - min(starts) / tick
    return Usage(ticks / tick, pages * page // MIB, max(0.0, uptime))
