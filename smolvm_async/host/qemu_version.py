"""The version of a QEMU program, and the machine types that the program knows."""

from __future__ import annotations

import re
from pathlib import Path

from smolvm_async.foundation.process import run

_outputs: dict[tuple[Path, str, int, int], str] = {}  # by file, so an update is noticed


async def qemu_version(qemu: Path) -> str:
    """Return the version, such as `7.2.22`. The first call runs the program, for some 20 ms."""
    found = re.search(r"version (\d+(?:\.\d+)*)", await _ask(qemu, "-version"))
    return found[1] if found else "unknown"


async def knows_machine(qemu: Path, machine_type: str) -> bool:
    """Return whether QEMU has the versioned machine type, such as `pc-q35-7.2`."""
    lines = (await _ask(qemu, "-machine help")).splitlines()
    return any(line.split()[:1] == [machine_type] for line in lines)


def version_key(version: str) -> tuple[int, ...]:
    """Return a key that orders versions."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


async def _ask(qemu: Path, option: str) -> str:
    status = qemu.stat()  # noqa: ASYNC240 - a program, not a file on a slow disk
    key = (qemu, option, status.st_size, status.st_mtime_ns)
    if key not in _outputs:
        _outputs[key] = await run([qemu, *option.split()])
    return _outputs[key]
