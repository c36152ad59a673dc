"""The processor that a guest sees: a saved guest can go on only with the same one."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def describe_processor(option: str, qemu_version: str, cpuinfo: Path = CPUINFO) -> str:
    """Return a text that is equal for two guests with equal processors.

    Args:
        option: The value of `-cpu`. The model `host` means this host's processor, and `max` means
            all features that this version of QEMU emulates; any other model means the same always.
    """
    model = option.partition(",")[0]
    if model == "host":
        return f"{option} ({_host_processor(cpuinfo)})"
    return f"{option} (QEMU {qemu_version})" if model == "max" else option


@functools.cache
def _host_processor(cpuinfo: Path) -> str:
    with cpuinfo.open() as lines:  # of a big host, only the first processor's lines are read
        fields: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            if not value and fields:
                break
            fields[name.strip()] = value.strip()
    flags = " ".join(sorted(fields.get("flags", "").split()))
    digest = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return f"{re.sub(' +', ' ', fields.get('model name', 'unknown'))}, features {digest}"
