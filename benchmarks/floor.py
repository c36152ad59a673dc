"""The floor: QEMU and its sidecars, spawned bare and all at once.

The command lines, descriptors and sockets are the library's own (`qemu.launch.commands`). Neither
asyncio nor the library's monitor is involved: the floor is the time that they are compared with.
Directories, overlays and UEFI variables are made before the clock starts.

Each process is in a session of its own, as the library's processes are. Linux divides the
processors among sessions first (`sched_autogroup_enabled`): in the benchmark's own session, the
processes would get a far smaller share on a busy machine.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolvm_async.config.options import make_config
from smolvm_async.controls.ssh.login import new_login
from smolvm_async.host.tools import choose_accelerator, find_plain_uefi, find_tools
from smolvm_async.images import qcow2
from smolvm_async.qemu.arguments import Descriptors, MachineSpec
from smolvm_async.qemu.launch import Command, commands
from smolvm_async.qemu.sidecars import directories, programs
from smolvm_async.state.names import OVERLAY, SEED, VARS


@dataclass
class Points:
    """Seconds from the first spawn to each point of one VM."""

    greeting: float = 0.0
    first_answer: float = 0.0
    running: float = 0.0


@dataclass
class Bare:
    """One VM: the commands of its processes, QEMU's first, and this side's end of the monitor.

    Attributes:
        ends: Closes the ends that the processes inherit, once they are spawned.
    """

    directory: Path
    commands: list[Command]
    monitor: socket.socket
    ends: ExitStack
    points: Points = field(default_factory=Points)
    buffer: bytes = b""
    pids: dict[str, int] = field(default_factory=dict)


def prepare(template: Mapping[str, Any], stack: ExitStack) -> Bare:
    """Prepare everything but the processes, for one VM with these arguments of `AsyncSmolVM`."""
    config = make_config(**template)
    profile = config.profile
    tools = find_tools(profile, programs(profile))
    if tools.firmware is None:
        tools = tools._replace(firmware=find_plain_uefi())  # what a blank image gets
    assert config.image is not None
    assert tools.firmware is not None
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    shutil.copy(tools.firmware.vars_template, directory / VARS)
    for name in directories(profile):
        (directory / name).mkdir()
    base = os.open(config.image, os.O_RDONLY)
    stack.callback(os.close, base)
    (directory / OVERLAY).write_bytes(qcow2.empty(qcow2.check(base).virtual_size))
    if profile.login == "nocloud":
        (directory / SEED).write_bytes(new_login(config).files(config)[SEED])
    ours, qemus = socket.socketpair()
    consoles, qemus_console = socket.socketpair()
    for end in (ours, consoles):
        stack.enter_context(end)
    ends = stack.enter_context(ExitStack())
    for end in (qemus, qemus_console):
        ends.enter_context(end)
    descriptors = Descriptors(qemus.fileno(), qemus_console.fileno(), screen_file(stack))
    accelerator = choose_accelerator(config.accel)[0]
    spec = MachineSpec(config, tools, accelerator, base, profile.sidecars)
    return Bare(directory, ends.enter_context(commands(spec, descriptors)), ours, ends)


def screen_file(stack: ExitStack) -> int:
    """Return the descriptor of a file in memory, to which QEMU writes its screen."""
    memory = os.memfd_create("screen")
    stack.callback(os.close, memory)
    screen = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY)
    stack.callback(os.close, screen)
    return screen


@contextmanager
def launched(
    template: Mapping[str, Any],
    count: int = 1,
    *,
    run: bool = True,
    overlay: bool = False,
    together: bool = False,
) -> Iterator[list[Bare]]:
    """Spawn `count` VMs at once and wait until all have answered, or run; kill them at the end.

    Args:
        template: Arguments of `AsyncSmolVM`.
        run: Whether the processors run (`cont`).
        together: Whether no processor runs before all VMs have answered, as in the library.
        overlay: Whether `qemu-img create` makes an overlay beside each VM, as a launcher does that
            does not know the format.
    """
    with ExitStack() as stack:
        vms = [prepare(template, stack) for _ in range(count)]
        made: list[subprocess.Popen[bytes]] = []
        began = time.perf_counter()
        for vm in vms:
            for command in vm.commands:
                vm.pids[command.name] = spawn(vm.directory, command.argv, command.fds, stack).pid
            if overlay:
                made.append(spawn(vm.directory, _create(str(template["image"])), [], stack))
        for vm in vms:
            vm.ends.close()
        at_once = ["cont"] if run and not together else []
        _converse(vms, ["qmp_capabilities", *at_once], began)
        if together:
            for vm in vms:
                vm.monitor.send(_line("cont"))
            _converse(vms, [], began)
        for making in made:
            making.wait()
        yield vms


def _create(image: str) -> list[str]:
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
    return [*create, image, "beside.qcow2"]


def spawn(
    directory: Path, argv: list[str], fds: list[int], stack: ExitStack
) -> subprocess.Popen[bytes]:
    """Spawn a process in a session of its own; `stack` kills it."""
    process = subprocess.Popen(argv, cwd=directory, pass_fds=fds, start_new_session=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _line(command: str) -> bytes:
    return json.dumps({"execute": command}).encode()


def _converse(vms: list[Bare], commands: Sequence[str], began: float) -> None:
    """Send the commands to each VM as soon as it has answered, until all have answered all."""
    with selectors.DefaultSelector() as selector:
        for vm in vms:
            selector.register(vm.monitor, selectors.EVENT_READ, (vm, iter(commands)))
        while selector.get_map():
            for key, _ in selector.select():
                vm, rest = key.data
                data = vm.monitor.recv(65536)
                if not data:
                    raise RuntimeError(f"QEMU has ended: {vm.commands[0].argv}")
                *lines, vm.buffer = (vm.buffer + data).split(b"\n")
                for line in lines:
                    if not _note(vm.points, json.loads(line), time.perf_counter() - began):
                        continue
                    command = next(rest, None)
                    if command is None:
                        selector.unregister(vm.monitor)
                        break
                    vm.monitor.send(_line(command))


def _note(points: Points, message: dict[str, Any], seconds: float) -> bool:
    """Note the time of a message, unless it is an event; return whether to send a command."""
    if "QMP" in message:
        points.greeting = seconds
    elif "return" not in message:
        return False
    elif points.first_answer:
        points.running = seconds
    else:
        points.first_answer = seconds
    return True
