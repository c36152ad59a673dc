"""Limits of VMs: more memory than the host has, bounds, out-of-memory kills."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, ConfigError, HostError, Limits, VMCrashedError
from smolvm_async.config.options import make_config
from smolvm_async.foundation.locking import LockFile, try_lock
from smolvm_async.host.memory import available_memory
from smolvm_async.vm import limits
from tests.conftest import child_named, children, vm_in

pytestmark = pytest.mark.anyio


async def test_a_vm_that_cannot_fit_is_refused_with_figures(
    blank_image: Path, data_dir: Path
) -> None:
    too_much = available_memory().total + 1024
    vm = vm_in(data_dir, blank_image, memory=too_much)
    with pytest.raises(HostError) as raised:
        await vm.start()
    message = str(raised.value)
    assert f"memory={too_much} MiB does not fit" in message
    assert re.search(r": \d+ MiB of \d+ MiB are available", message)
    assert not list(data_dir.iterdir())


async def test_all_vms_together_stay_within_max_memory(
    blank_image: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = {"max_memory": 5000}
    async with vm_in(data_dir, blank_image, limits=bound) as first:
        monkeypatch.setattr(limits, "OVERHEAD", available_memory().total)
        with pytest.raises(
            HostError, match=r"count=2 clones do not fit: each .* MiB are available"
        ):
            await first.fork(2)
        second = vm_in(data_dir, blank_image, limits=Limits(max_memory=5000))
        third = vm_in(data_dir, blank_image, limits=bound)
        outcomes = await asyncio.gather(second.start(), third.start(), return_exceptions=True)
        (refused,) = [outcome for outcome in outcomes if outcome is not None]
        assert isinstance(refused, HostError)
        assert "max_memory=5000 MiB, and 2 running VMs already use 4096 MiB" in str(refused)
        await asyncio.gather(second.stop(timeout=0), third.stop(timeout=0))
        async with vm_in(data_dir, blank_image, limits=bound):
            pass  # there is room again, though a stopped one has not been deleted yet
        await asyncio.gather(second.delete(), third.delete())


async def test_a_lock_that_another_holds_delays_and_is_told(
    blank_image: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BUSY", 0.2)
    data_dir.mkdir(mode=0o700)
    lock = data_dir / "max_memory.lock"
    holder = LockFile(lock)
    assert holder.try_lock()
    vm = vm_in(data_dir, blank_image, limits={"max_memory": 5000})
    with pytest.raises(HostError, match=r"another process has locked .*max_memory\.lock"):
        await vm.start()
    assert lock.stat().st_mode & 0o777 == 0o600  # no other user can hold it
    starting = asyncio.ensure_future(vm.start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert [entry.name for entry in data_dir.iterdir()] == [lock.name]
    os.close(holder.fd)  # as if its holder had been killed
    await AsyncSmolVM.prune(data_dir=data_dir)
    assert not list(data_dir.iterdir())
    async with vm:
        pass


async def test_who_locks_the_data_directory_itself_is_not_waited_for(
    blank_image: Path, data_dir: Path
) -> None:
    data_dir.mkdir(mode=0o755)
    fd = os.open(data_dir, os.O_RDONLY)  # another user could do that
    assert try_lock(fd)
    async with vm_in(data_dir, blank_image, limits={"max_memory": 5000}):
        pass
    os.close(fd)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"max_memory": 0}, ["limits: max_memory=0", "greater than 0"]),
        ({"vm_cpus": -1}, ["limits: vm_cpus=-1", "greater than 0"]),
        ({"vm_memory": 1.5}, ["limits: vm_memory=1.5"]),
        ({"vm_memory": 2048}, ["limits: vm_memory=2048", "too small for memory=2048"]),
        ({"memory": 5}, ["limits= has unknown fields: memory", "max_memory, vm_memory, vm_cpus"]),
        (5, ["limits=5", "Limits(max_memory=16384)", "mapping"]),
    ],
)
def test_bounds_that_cannot_be_meant_are_refused(
    blank_image: Path, data_dir: Path, bounds: Any, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        vm_in(data_dir, blank_image, limits=bounds)
    for word in words:
        assert word in str(raised.value)


@pytest.fixture
def fake_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `systemd-run` that writes down its arguments and becomes the command."""
    programs, runtime = tmp_path / "bin", tmp_path / "run"
    (runtime / "systemd" / "private").mkdir(parents=True)
    programs.mkdir()
    seen = tmp_path / "seen"
    script = programs / "systemd-run"
    script.write_text(
        f'#!/bin/sh\nfor word; do shift; [ "$word" != -- ] || break; echo "$word" >>{seen}; done\n'
        'exec "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr(limits, "SYSTEM_RUNTIME", runtime)
    return seen


async def test_qemu_is_bounded_by_a_systemd_scope(
    blank_image: Path, data_dir: Path, fake_systemd: Path
) -> None:
    bounds = Limits(vm_memory=3000, vm_cpus=1.5)
    async with vm_in(data_dir, blank_image, limits=bounds) as vm:
        words = fake_systemd.read_text().split()
        assert "--scope" in words
        assert ("--user" in words) == (os.geteuid() != 0)
        assert {"MemoryMax=3000M", "MemorySwapMax=0", "CPUQuota=150%"} <= set(words)
        assert len(children()) == 2
        assert str(vm.status) == "running"


def test_bounds_without_systemd_are_refused_at_once(
    blank_image: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(limits, "SYSTEM_RUNTIME", tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(HostError, match="needs systemd"):
        vm_in(data_dir, blank_image, limits={"vm_memory": 3000})


def test_no_bounds_need_no_systemd(data_dir: Path) -> None:
    config = make_config(os="windows", image="x.qcow2", data_dir=data_dir)
    assert limits.scope_prefix(config) == ()


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 16 MiB; its `cgroup.procs` is yielded."""
    for root, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        cgroup = root / f"smolvm-async-test-{os.getpid()}"
        try:
            cgroup.mkdir()
        except OSError:
            continue
        try:
            (cgroup / limit).write_text(str(16 << 20))
            yield cgroup / "cgroup.procs"
            return
        except OSError:
            continue
        finally:
            cgroup.rmdir()
    pytest.skip("no memory cgroup can be made here")


async def test_an_out_of_memory_kill_is_recognised(
    blank_image: Path, data_dir: Path, small_cgroup: Path
) -> None:
    with pytest.raises(VMCrashedError) as raised:
        async with vm_in(data_dir, blank_image):
            small_cgroup.write_text(str(child_named("qemu")))
            await asyncio.sleep(60)  # the firmware touches more than that
    assert "the kernel's out-of-memory killer has ended 1 process since" in str(raised.value)
    assert "QEMU ended: killed by SIGKILL" in str(raised.value)


def test_kills_are_counted_where_the_kernel_tells(tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 5\noom_kill 3\noom_kill_x 9\n")
    assert limits.oom_kills(vmstat) == 3
    vmstat.write_text("nr_free_pages 5\n")
    assert limits.oom_kills(vmstat) == 0
    assert limits.oom_kills(tmp_path / "missing") == 0
