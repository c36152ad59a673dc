"""The seccomp filter: what it selects, run as the kernel would run it; and refusals of the host."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import struct
from pathlib import Path

import pytest

from smolvm_async import HostError
from smolvm_async.host import restrictions, seccomp
from smolvm_async.host.seccomp import MACHINES, Machine
from smolvm_async.qemu.internet.trial import find_problem

NOTIFY, ALLOW, KILL = 0x7FC00000, 0x7FFF0000, 0x80000000
NOT_THERE = 0x00050000 | errno.ENOSYS
READ, SENDMSG, SOCKET = 0, 46, 41


def verdict(machine: Machine, number: int, address: int = 0, audit: int | None = None) -> int:
    """Run the filter for a call whose fifth argument is `address`, and return its action."""
    abi = machine.audit if audit is None else audit
    data = struct.pack("=iIQ6Q", number, abi, 0, 3, 0, 0, 0, address, 0)
    steps = list(struct.iter_unpack("=HBBI", seccomp.program(machine)))
    accumulator = at = 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return int(value)
        else:
            holds = accumulator == value if code == 0x15 else accumulator >= value
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_the_filter_selects_the_calls_that_name_the_other_end(machine: Machine) -> None:
    assert verdict(machine, machine.connect) == NOTIFY
    for number in machine.sendto, machine.recvfrom:
        assert verdict(machine, number) == ALLOW
        for address in 1, 0x7FFF_0000_0000, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF:
            assert verdict(machine, number, address) == NOTIFY, hex(address)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_the_filter_refuses_the_calls_that_would_hide_an_address(machine: Machine) -> None:
    for number in machine.sendmmsg, machine.io_uring_setup:
        assert verdict(machine, number) == verdict(machine, number, 1) == NOT_THERE


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_the_filter_kills_calls_of_another_abi(machine: Machine) -> None:
    for audit in {0x40000003, *(other.audit for other in MACHINES.values())} - {machine.audit}:
        assert verdict(machine, machine.connect, audit=audit) == KILL


def test_the_filter_kills_calls_of_the_x32_abi() -> None:
    assert verdict(MACHINES["x86_64"], MACHINES["x86_64"].connect | 0x40000000) == KILL


def test_the_filter_allows_all_other_calls() -> None:
    for number in READ, SENDMSG, SOCKET:
        assert verdict(MACHINES["x86_64"], number, 1) == ALLOW


def test_memory_is_read_and_written() -> None:
    sample = ctypes.create_string_buffer(b"a guest's packet")
    at = ctypes.addressof(sample)
    assert seccomp.read_memory(os.getpid(), at, 7) == b"a guest"
    seccomp.write_memory(os.getpid(), at, b"A")
    assert sample.value == b"A guest's packet"
    with pytest.raises(OSError, match="process_vm"):
        seccomp.read_memory(os.getpid(), 0, 1)


@pytest.mark.parametrize(
    ("call", "number", "told"),
    [
        ("pidfd_getfd", errno.EPERM, r"pidfd_getfd\(2\).*pidfd_getfd"),
        ("seccomp", errno.EINVAL, r"seccomp\(2\)"),
        ("seccomp", errno.EBUSY, "SCMP_ACT_NOTIFY"),
    ],
)
def test_a_host_that_refuses_is_told_with_the_call_and_the_cure(
    call: str, number: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pidfd: int, descriptor: int) -> int:
        raise OSError(number, f"{call}(2): {os.strerror(number)}")

    monkeypatch.setattr(seccomp, "take_descriptor", refuse)
    with pytest.raises(HostError) as caught:
        seccomp.check_seccomp()
    error = caught.value
    assert "cannot be guarded" in error.message
    assert re.search(told, f"{error.message} {error.hint}")


@pytest.mark.parametrize("scope", [0, 1, 3])
def test_a_host_whose_yama_hides_the_descriptors_of_children_is_told(
    scope: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restrictions, "YAMA", tmp_path / "ptrace_scope")
    restrictions.YAMA.write_text(f"{scope}\n")
    if scope < 2:
        seccomp.check_seccomp()
    else:
        with pytest.raises(HostError, match=r"(?s)ptrace_scope=3.*ptrace_scope=1"):
            seccomp.check_seccomp()


def test_a_shortage_is_not_a_host_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, all later guests of this process would have an open network."""

    def lack(pidfd: int, descriptor: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    find_problem.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(seccomp, "take_descriptor", lack)
        with pytest.raises(HostError, match="cannot be guarded now"):
            find_problem()
    assert find_problem() is None


def test_an_old_kernel_and_an_unknown_processor_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.4.0-42-generic")
    refusal = OSError(errno.EINVAL, "seccomp(2): Invalid argument")
    assert "5.4.0-42-generic" in seccomp.refused(refusal).message
    assert "5.9" in seccomp.refused(refusal).hint
    monkeypatch.undo()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(HostError, match="riscv64"):
        seccomp.check_seccomp()
