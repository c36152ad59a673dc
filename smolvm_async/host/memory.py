"""The memory that this process can still use: the host's, or less if a cgroup limits it.

A cgroup's usage includes cached files. The kernel drops inactive cached files on demand, so they
count as available here, as in Kubernetes' "working set".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

MIB = 1 << 20


class Memory(NamedTuple):
    """Memory in MiB; `limit` is `host`, or `cgroup` and the path of the limiting cgroup."""

    total: int
    available: int
    limit: str = "host"


class Files(NamedTuple):
    """The names under which a version of cgroups shows the limit, usage and inactive files."""

    hierarchy: str
    limit: str
    usage: str
    inactive: str


VERSION_1 = Files("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = Files("", "memory.max", "memory.current", "inactive_file")


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Return the host's memory, or the memory of this process's most restrictive cgroup."""
    host = parse_meminfo((proc / "meminfo").read_text())
    try:
        memberships = (proc / "self" / "cgroup").read_text()
    except OSError:
        return host
    limits = _limits(parse_cgroups(memberships), cgroups)
    return min((host, *limits), key=lambda memory: memory.available)


def own_memory(pid: int, *, files: bool = True, proc: Path = Path("/proc")) -> int:
    """Return the MiB that would be free without a process; 0 if the process has ended.

    These are its anonymous pages, and its pages of files in memory (memfd). The RAM of a clone is a
    private mapping of the snapshot's file: until the guest writes to a page, all clones share this
    page of the file, and without the process it would not be free.

    Args:
        files: Whether files in memory belong to the process alone. The file of a snapshot may be on
            a tmpfs, and then does not.
    """
    try:
        status = (proc / str(pid) / "status").read_text()
    except OSError:
        return 0
    kinds = "Anon|Shmem" if files else "Anon"
    return sum(int(kib) for kib in re.findall(rf"(?m)^Rss(?:{kinds}):\s*(\d+) kB$", status)) // 1024


def parse_meminfo(text: str) -> Memory:
    """Parse `/proc/meminfo` into the host's memory."""
    sizes = {name: int(kib) // 1024 for name, kib in re.findall(r"(?m)^(\w+): *(\d+) kB$", text)}
    return Memory(sizes["MemTotal"], sizes["MemAvailable"])


def parse_cgroups(text: str) -> list[tuple[Files, PurePosixPath]]:
    """Parse `/proc/self/cgroup` into this process's memory cgroups, of version 1 or 2."""
    found = []
    for line in text.splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            found.append((VERSION_1, PurePosixPath(path)))
        elif hierarchy == "0":
            found.append((VERSION_2, PurePosixPath(path)))
    return found


def _limits(memberships: list[tuple[Files, PurePosixPath]], cgroups: Path) -> Iterator[Memory]:
    """Yield the memory of each cgroup that has a limit, and of the cgroups above it.

    In a container, the path may be the host's path; then only the root cgroup exists here.
    """
    for files, path in memberships:
        for cgroup in (path, *path.parents):
            directory = cgroups / files.hierarchy / str(cgroup).lstrip("/")
            try:
                limit = (directory / files.limit).read_text()
                usage = (directory / files.usage).read_text()
                stat = (directory / "memory.stat").read_text()
            except OSError:
                continue
            if (memory := parse_limit(limit, usage, stat, files)) is not None:
                yield memory._replace(limit=f"cgroup {cgroup}")


def parse_limit(limit: str, usage: str, stat: str, files: Files) -> Memory | None:
    """Parse the files of one cgroup into its memory; `None` if it has no limit."""
    if limit.strip() == "max":
        return None
    inactive = re.search(rf"(?m)^{files.inactive} (\d+)$", stat)
    used = int(usage) - (int(inactive[1]) if inactive else 0)
    return Memory(int(limit) // MIB, max(0, int(limit) - used) // MIB)
