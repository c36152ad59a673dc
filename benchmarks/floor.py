"""The floor: QEMU and swtpm spawned bare and at once, with the library's own command lines.

What they need besides (directories, overlays, UEFI variables) is made before the clock starts.
Each is in a session of its own, as the library's are: Linux shares the processors out between
sessions first (`sched_autogroup_enabled`), so on a busy machine processes that share one with the
benchmark would get far less of them.
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

from smolvm_async.config.vm_config import make_config
from smolvm_async.controls.ssh.login import new_login
from smolvm_async.host import choose_accelerator, find_plain_uefi, find_tools
from smolvm_async.images import qcow2
from smolvm_async.qemu.arguments import Descriptors, qemu_arguments
from smolvm_async.qemu.sidecars.swtpm import attach_arguments, swtpm_arguments
from smolvm_async.state.directory import OVERLAY, SEED, TPM, VARS


@dataclass
class Points:
    """Seconds from the first spawn to each point of one VM."""

    greeting: float = 0.0
    first_answer: float = 0.0
    running: float = 0.0


@dataclass
class Bare:
    """One VM: its command lines, and the descriptors that each inherits."""

    directory: Path
    qemu: list[str]
    qemu_fds: list[int]
    swtpm: list[str]
    swtpm_fds: list[int]
    monitor: socket.socket
    childs_ends: list[socket.socket]
    points: Points = field(default_factory=Points)
    buffer: bytes = b""
    pids: dict[str, int] = field(default_factory=dict)


def prepare(template: Mapping[str, Any], stack: ExitStack) -> Bare:
    """Everything but the processes, for one VM with these arguments of `AsyncSmolVM`."""
    config = make_config(**template)
    tools = find_tools(config.profile)
    if tools.firmware is None:
        tools = tools._replace(firmware=find_plain_uefi())  # what a blank image gets
    assert config.image is not None
    assert tools.firmware is not None
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    shutil.copy(tools.firmware.vars_template, directory / VARS)
    (directory / TPM).mkdir()
    base = os.open(config.image, os.O_RDONLY)
    stack.callback(os.close, base)
    (directory / OVERLAY).write_bytes(qcow2.empty(qcow2.check(base).virtual_size))
    if config.profile.login == "nocloud":
        (directory / SEED).write_bytes(new_login(config).files(config)[SEED])
    ours, monitor, consoles, console, swtpms, tpm = (
        stack.enter_context(end) for _ in range(3) for end in socket.socketpair()
    )
    del consoles
    screen = _screen(stack)
    with_tpm = "swtpm" in config.profile.sidecars
    qemu = qemu_arguments(
        config,
        tools,
        choose_accelerator(config.accel)[0],
        Descriptors(monitor.fileno(), console.fileno(), base, screen),
        attach_arguments(tpm.fileno()) if with_tpm else [],
    )
    return Bare(
        directory,
        qemu,
        [base, monitor.fileno(), console.fileno(), tpm.fileno(), screen],
        swtpm_arguments(tools, swtpms.fileno()) if with_tpm else [],
        [swtpms.fileno()],
        ours,
        [monitor, console, tpm, swtpms],
    )


def _screen(stack: ExitStack) -> int:
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
    """Spawn `count` VMs at once, until all have answered, or run; killed at the end.

    Args:
        template: Arguments of `AsyncSmolVM`.
        run: Whether their processors are to run (`cont`).
        together: Whether no processor runs before all have answered, as in the library.
        overlay: Whether `qemu-img create` makes an overlay beside each, as a launcher would that
            does not know the format.
    """
    with ExitStack() as stack:
        vms = [prepare(template, stack) for _ in range(count)]
        made: list[subprocess.Popen[bytes]] = []
        began = time.perf_counter()
        for vm in vms:
            vm.pids["QEMU"] = _spawn(vm, vm.qemu, vm.qemu_fds, stack).pid
            if vm.swtpm:
                vm.pids["swtpm"] = _spawn(vm, vm.swtpm, vm.swtpm_fds, stack).pid
            if overlay:
                made.append(_spawn(vm, _create(str(template["image"])), [], stack))
        for vm in vms:
            for end in vm.childs_ends:
                end.close()
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


def _spawn(vm: Bare, argv: list[str], fds: list[int], stack: ExitStack) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(argv, cwd=vm.directory, pass_fds=fds, start_new_session=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _line(command: str) -> bytes:
    return json.dumps({"execute": command}).encode()


def _converse(vms: list[Bare], commands: Sequence[str], began: float) -> None:
    """Have all of them answer, and each do the commands as soon as it can."""
    with selectors.DefaultSelector() as selector:
        for vm in vms:
            selector.register(vm.monitor, selectors.EVENT_READ, (vm, iter(commands)))
        while selector.get_map():
            for key, _ in selector.select():
                vm, rest = key.data
                data = vm.monitor.recv(65536)
                if not data:
                    raise RuntimeError(f"QEMU has ended: {vm.qemu}")
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
    """Note the time of what is no event."""
    if "QMP" in message:
        points.greeting = seconds
    elif "return" not in message:
        return False
    elif points.first_answer:
        points.running = seconds
    else:
        points.first_answer = seconds
    return True
