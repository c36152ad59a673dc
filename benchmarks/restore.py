"""The floor of a clone: QEMU and its sidecars, spawned bare, load a snapshot that the library took.

As in `floor.py`, the command lines are the library's own, and the files are there before the clock
starts. Nothing sets the guest right.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.floor import screen_file, spawn
from smolvm_async.config.options import make_clone_config
from smolvm_async.config.source import Source
from smolvm_async.host.tools import choose_accelerator, find_tools
from smolvm_async.images import qcow2
from smolvm_async.qemu.arguments import Descriptors, DirectBoot, MachineSpec, RAMFile
from smolvm_async.qemu.launch import Command, commands
from smolvm_async.qemu.sidecars import directories, programs
from smolvm_async.state.names import next_layer
from smolvm_async.state.snapshot_record import MACHINE, RAM, SnapshotRecord, read_snapshot

CHANNEL = "snapshot"  # the name of the file `machine` in QEMU
LOAD: Sequence[Mapping[str, Any]] = (
    {"execute": "qmp_capabilities"},
    {
        "execute": "migrate-set-capabilities",
        "arguments": {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
    },
    {"execute": "getfd", "arguments": {"fdname": CHANNEL}},
    {"execute": "migrate-incoming", "arguments": {"uri": f"fd:{CHANNEL}"}},
    {"execute": "cont"},
)


class Restored(NamedTuple):
    """Seconds from the first spawn until the guest runs, and until it has powered itself off."""

    running: float
    off: float | None


class _Bare(NamedTuple):
    directory: Path
    commands: list[Command]
    monitor: socket.socket
    ends: ExitStack
    machine: int


def restore(snapshot: Path, *, power_off: bool = False) -> Restored:
    """Load a snapshot into a bare QEMU.

    Args:
        snapshot: The directory of the snapshot.
        power_off: Whether to press the power button as soon as the guest runs.
    """
    with ExitStack() as stack:
        vm = _prepare(snapshot, stack)
        began = time.perf_counter()
        pids = [spawn(vm.directory, each.argv, each.fds, stack).pid for each in vm.commands]
        vm.ends.close()
        messages = _messages(vm.monitor)
        next(message for message in messages if "QMP" in message)
        for command in LOAD:
            files = [vm.machine] if command["execute"] == "getfd" else []
            _execute(vm.monitor, command, files)
            # QEMU answers `cont` at once, and lets the guest run as soon as it has loaded it.
            _wait(messages, "RESUME" if command["execute"] == "cont" else "return")
        running = time.perf_counter() - began
        if not power_off:
            return Restored(running, None)
        _execute(vm.monitor, {"execute": "system_powerdown"}, [])
        os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
        return Restored(running, time.perf_counter() - began)


def _prepare(snapshot: Path, stack: ExitStack) -> _Bare:
    """Prepare everything but the processes, for one clone."""
    record = _read(snapshot)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=snapshot.parents[1])))
    options: Any = {"data_dir": directory, "accel": record.accelerator}
    config = make_clone_config(record.config, **options)
    profile = config.profile
    for name in directories(profile):
        (directory / name).mkdir()
    for name in record.files:
        if name not in (RAM, MACHINE):
            shutil.copy(snapshot / name, directory / name)
    source, frozen = record.machine.source, record.machine.layers
    assert source is not None
    base, ram, machine = (
        _open(p, stack) for p in (source.image, snapshot / RAM, snapshot / MACHINE)
    )
    layers = (*frozen, next_layer(frozen))
    (directory / layers[-1]).write_bytes(qcow2.empty(qcow2.check(base).virtual_size))
    sockets = [socket.socketpair() for _ in range(3)]
    for ours, _ in sockets:
        stack.enter_context(ours)
    ends = stack.enter_context(ExitStack())
    monitor, console, parked = (ends.enter_context(theirs).fileno() for _, theirs in sockets)
    has_parked = parked if profile.login == "fw_cfg" else None
    spec = MachineSpec(
        config,
        find_tools(profile, programs(profile)),
        choose_accelerator(config.accel)[0],
        base,
        profile.sidecars,
        disk_format=source.format,
        machine_type=record.machine.type,
        direct_boot=_direct_boot(source, stack),
        layers=layers,
        ram=RAMFile(ram, shared=False),
        incoming=True,
    )
    descriptors = Descriptors(monitor, console, screen_file(stack), has_parked)
    made = ends.enter_context(commands(spec, descriptors))
    return _Bare(directory, made, sockets[0][0], ends, machine)


def _read(snapshot: Path) -> SnapshotRecord:
    with ExitStack() as stack:
        record = read_snapshot(snapshot, _open(snapshot, stack))
    assert record is not None
    return record


def _open(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY)
    stack.callback(os.close, fd)
    return fd


def _direct_boot(source: Source, stack: ExitStack) -> DirectBoot | None:
    if source.kernel is None:
        return None
    initrd = _open(source.initrd, stack) if source.initrd else None
    return DirectBoot(_open(source.kernel, stack), initrd, source.boot_args)


def _execute(monitor: socket.socket, command: Mapping[str, Any], files: Sequence[int]) -> None:
    socket.send_fds(monitor, [json.dumps(command).encode()], files)


def _messages(monitor: socket.socket) -> Iterator[dict[str, Any]]:
    with monitor.makefile("r") as lines:
        for line in lines:
            yield json.loads(line)


def _wait(messages: Iterator[dict[str, Any]], wanted: str) -> None:
    """Wait for an answer (`return`), or for an event."""
    for message in messages:
        if "error" in message:
            raise RuntimeError(f"QEMU refused to load the snapshot: {message['error']}")
        if wanted in message or message.get("event") == wanted:
            return
    raise RuntimeError("QEMU has ended")
