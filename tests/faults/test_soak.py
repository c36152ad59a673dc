"""Many VMs, one after another and at once: the process holds no more than after the first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IN_TURN, AT_ONCE = 100, 16

# The growth that allocator and caches are allowed after the first VMs. A leak of 10 objects (of any
# size), or of 40 KiB, for each VM would be more; 800 VMs take hardly more than 100 do. Of one type,
# a leak of one object for each VM is found.
MORE_BLOCKS = 10 * IN_TURN
MORE_KIB = 40 * IN_TURN

SAME = ("descriptors", "threads", "children", "entries", "tasks", "loggers")


def test_soak(blank_image: Path, data_dir: Path) -> None:
    job: list[str | Path] = [sys.executable, "-m", "tests.faults.soak", blank_image, data_dir]
    done = subprocess.run(
        [*job, str(IN_TURN), str(AT_ONCE)], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    first, after_turns, last = json.loads(done.stdout)
    told = "\n".join(
        f"{name}: {first[name]} -> {after_turns[name]} -> {last[name]}"
        for name in (*SAME, "blocks", "resident_kib")
    )
    for later in (after_turns, last):
        assert {name: later[name] for name in SAME} == {name: first[name] for name in SAME}, told
        assert later["blocks"] - first["blocks"] < MORE_BLOCKS, told
        assert later["resident_kib"] - first["resident_kib"] < MORE_KIB, told
    assert not grown(first, after_turns, IN_TURN), told
    assert not grown(after_turns, last, AT_ONCE), told


def grown(before: dict[str, Any], after: dict[str, Any], vms: int) -> dict[str, int]:
    """Return the types with at least one more object for each VM."""
    counts: dict[str, int] = after["objects"]
    growth = {name: count - before["objects"].get(name, 0) for name, count in counts.items()}
    return {name: count for name, count in growth.items() if count >= vms}
