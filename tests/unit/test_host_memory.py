"""The memory that a process can still use, from the kernel's texts."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from smolvm_async.host.memory import (
    VERSION_1,
    VERSION_2,
    Memory,
    available_memory,
    own_memory,
    parse_cgroups,
    parse_limit,
    parse_meminfo,
)

MIB = 1 << 20
MEMINFO = """\
MemTotal:        8388608 kB
MemFree:          102400 kB
MemAvailable:    4194304 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""
UNLIMITED = "9223372036854771712\n"  # version 1's way to say so


class Host:
    """The files of a host with 8 GiB, of which 4 are available."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        self.write(self.proc / "meminfo", MEMINFO)

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def member_of(self, text: str) -> None:
        self.write(self.proc / "self" / "cgroup", text)

    def limit_v1(self, path: str, limit: str, used: int, inactive: int = 0) -> None:
        directory = self.cgroups / "memory" / path
        self.write(directory / "memory.limit_in_bytes", limit)
        self.write(directory / "memory.usage_in_bytes", f"{used * MIB}\n")
        stat = f"inactive_file 1\ntotal_inactive_file {inactive * MIB}\n"
        self.write(directory / "memory.stat", stat)

    def limit_v2(self, path: str, limit: str, used: int, inactive: int = 0) -> None:
        directory = self.cgroups / path
        self.write(directory / "memory.max", limit)
        self.write(directory / "memory.current", f"{used * MIB}\n")
        self.write(directory / "memory.stat", f"anon 1\ninactive_file {inactive * MIB}\n")

    def memory(self) -> Memory:
        return available_memory(self.proc, self.cgroups)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_the_hosts_own(host: Host) -> None:
    assert host.memory() == parse_meminfo(MEMINFO) == Memory(8192, 4096, "host")


def test_version_2_binds_at_every_level(host: Host) -> None:
    host.member_of("0::/slice/service\n")
    host.limit_v2("slice/service", "max\n", 100)
    assert host.memory().limit == "host"
    host.limit_v2("slice", f"{1024 * MIB}\n", used=300, inactive=100)
    assert host.memory() == Memory(1024, 824, "cgroup /slice")
    host.limit_v2("slice/service", f"{512 * MIB}\n", used=500)
    assert host.memory() == Memory(512, 12, "cgroup /slice/service")


def test_version_1_binds_too(host: Host) -> None:
    host.member_of("5:cpu,cpuacct:/\n4:memory:/a/b\n0::/\n")
    host.limit_v1("a", UNLIMITED, 5)
    assert host.memory().limit == "host"
    host.limit_v1("a/b", f"{2048 * MIB}\n", used=1024, inactive=24)
    assert host.memory() == Memory(2048, 1048, "cgroup /a/b")


def test_in_a_container_the_path_is_the_hosts(host: Host) -> None:
    host.member_of("4:memory:/docker/0123\n")
    host.limit_v1("", f"{256 * MIB}\n", used=0)
    assert host.memory() == Memory(256, 256, "cgroup /")


def test_a_cgroup_over_its_limit_has_nothing(host: Host) -> None:
    host.member_of("0::/x:y\n")
    host.limit_v2("x:y", f"{256 * MIB}\n", used=300)
    assert host.memory() == Memory(256, 0, "cgroup /x:y")


def test_texts() -> None:
    assert [str(path) for _, path in parse_cgroups("1:name=systemd:/a\n3:memory:/b\n")] == ["/b"]
    assert parse_limit("max\n", "1", "", VERSION_2) is None
    assert parse_limit(f"{MIB}", "0", "", VERSION_1) == Memory(1, 1)


def test_pages_that_clones_share_are_not_their_own(host: Host) -> None:
    status = "Name:\tqemu\nVmRSS:\t  614400 kB\nRssAnon:\t  102400 kB\n"
    host.write(host.proc / "7" / "status", f"{status}RssFile:\t 307200 kB\nRssShmem:\t 204800 kB\n")
    assert own_memory(7, proc=host.proc) == 300
    assert own_memory(7, files=False, proc=host.proc) == 100
    assert own_memory(8, proc=host.proc) == 0
    pages = mmap.mmap(-1, 32 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = own_memory(os.getpid(), files=False)
    pages.write(bytes(16 * MIB))
    assert own_memory(os.getpid(), files=False) >= before + 15


def test_this_host() -> None:
    memory = available_memory()
    assert 0 < memory.available <= memory.total
