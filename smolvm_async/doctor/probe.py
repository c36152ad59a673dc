"""The firmware probe: boot a guest's machine with a disk that Secure Boot must refuse.

One boot of a few seconds shows whether the accelerator runs a guest, and whether the firmware works
(with SMM), reads a virtio-scsi disk and enforces Secure Boot. Then the firmware tries the network,
which shows whether QEMU's DHCP server answers.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, cast

from smolvm_async.config.checks import AccelName
from smolvm_async.config.options import make_config
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.doctor.unsigned import unsigned_disk
from smolvm_async.doctor.verdicts import NETWORK, Sighting, offered_address
from smolvm_async.errors import LaunchError, MonitorError, VMNotRunningError
from smolvm_async.foundation.process import Child, describe_exit, run
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.guests import GuestName, GuestProfile
from smolvm_async.host.accelerator import Accelerator
from smolvm_async.host.tools import HostTools
from smolvm_async.images import qcow2
from smolvm_async.images.local import BaseImage, open_image
from smolvm_async.qemu.arguments import MachineSpec
from smolvm_async.qemu.console import Console
from smolvm_async.qemu.launch import Processes, launch
from smolvm_async.qemu.monitor import Monitor
from smolvm_async.qemu.screen import Screen
from smolvm_async.qemu.sidecars import directories
from smolvm_async.state.directory import Parts, VMDirectory

RAW, DISK, CAPTURE = "unsigned.raw", "unsigned.qcow2", "network.pcap"

LAUNCH = 30.0  # seconds until QEMU's first answer
BOOT = {"kvm": 60.0, "tcg": 90.0}  # seconds until the firmware has finished with the disk
DHCP = 15.0  # seconds from then until the DHCP server has offered an address
EXIT = 1.0  # seconds for QEMU to exit after the end of the monitor's connection
POLL = 0.1  # seconds between two observations

# Boot from the network after the disk, and capture the packets in a file.
NETWORK_OPTIONS = (
    *("-global", "virtio-net-pci.bootindex=2"),
    *("-object", f"filter-dump,id=capture,netdev=network,file={CAPTURE}"),
)
USER_NETWORK = "user,id=network"
NO_NETWORK = "hubport,id=network,hubid=0"  # connected to nothing; every QEMU supports it


class ProbeMachine(NamedTuple):
    """A machine to probe. `parts` names the network and the sidecars; QEMU may refuse them."""

    profile: GuestProfile
    tools: HostTools
    accelerator: Accelerator
    parts: frozenset[str]


class _RefusedError(Exception):
    """QEMU refused the machine. The message quotes QEMU."""


@asynccontextmanager
async def scratch(data_dir: Path) -> AsyncIterator[VMDirectory]:
    """Make a locked directory, `doctor-` and 8 hex digits, and remove it after the block."""
    state = VMDirectory(data_dir, f"doctor-{os.urandom(4).hex()}")
    try:
        await state.hold(create=True)
        await in_thread(state.mark_scratch)
        yield state
    finally:
        await in_thread(state.remove)


async def make_disk(qemu_img: Path, directory: Path) -> None:
    """Make the unsigned disk in `directory` as a qcow2."""
    await in_thread((directory / RAW).write_bytes, unsigned_disk())
    words = ("convert", "-f", "raw", "-O", "qcow2", RAW, DISK)
    await run([qemu_img, *words], cwd=directory)


def probe_deadline(accelerator: Accelerator, parts: frozenset[str]) -> float:
    """Return the deadline of `probe()`, which launches QEMU at most once per subset of `parts`."""
    return (1 << len(parts)) * LAUNCH + BOOT[accelerator.name] + DHCP


async def probe(machine: ProbeMachine, data_dir: Path) -> Sighting:
    """Boot the firmware. Leave out the parts of the machine that QEMU refuses."""
    refusals: dict[frozenset[str], str] = {}
    for left_out in _subsets(machine.parts):
        try:
            async with scratch(data_dir) as state:
                smaller = machine._replace(parts=machine.parts - left_out)
                sighting = await _boot(smaller, state)
        except _RefusedError as refusal:
            refusals[left_out] = str(refusal)
        else:
            blamed = {part: refusals[left_out - {part}] for part in left_out}
            return sighting._replace(refused=blamed)
    return Sighting(machine.accelerator.name, failure=refusals[frozenset()])


def _subsets(parts: frozenset[str]) -> list[frozenset[str]]:
    """Return all subsets, the smallest first."""
    sizes = range(len(parts) + 1)
    return [frozenset(some) for size in sizes for some in combinations(sorted(parts), size)]


async def _boot(machine: ProbeMachine, state: VMDirectory) -> Sighting:
    """Launch the machine and observe it until all results are known.

    Raises:
        _RefusedError: QEMU ended with an error. It may start without one of the parts.
        LaunchError: A process could not be spawned.
    """
    await make_disk(machine.tools.qemu_img, state.path)
    config = make_config(
        os=cast("GuestName", machine.profile.name),
        image=state.path / DISK,
        memory=machine.profile.minimum_memory,
        cpus=1,  # under TCG a second core makes SMM wait for the host's scheduler
        vm_id=state.path.name,
        accel=cast("AccelName", machine.accelerator.name),
        data_dir=state.path.parent,
    )
    monitor, console = Monitor(lambda event: None), Console()
    screen = Screen(monitor, config.resolution)
    started = time.monotonic()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(monitor.disconnect)
        stack.callback(console.close)
        stack.callback(screen.close)
        processes = await stack.enter_async_context(Processes())
        try:
            with open_image(state.path / DISK) as image:
                spec = await _prepare(machine, config, image, state)
                await launch(
                    processes,
                    spec,
                    state.path,
                    monitor,
                    console,
                    screen,
                    timeout=LAUNCH,
                    amend=partial(_with_network, machine),
                )
            await monitor.execute("cont")
        except (LaunchError, MonitorError, VMNotRunningError) as error:
            if isinstance(error.__cause__, OSError):
                raise  # a process could not be spawned
            qemu = processes.qemu
            await asyncio.wait([qemu.exited], timeout=EXIT)
            if qemu.ended and (qemu.returncode is None or qemu.returncode > 0):
                raise _RefusedError(_last_words(qemu)) from error
            failure = str(error) if not qemu.ended else _last_words(qemu)
            return Sighting(machine.accelerator.name, failure=failure)
        return await _watch(machine, state, processes.qemu, monitor, console, started)


async def _prepare(
    machine: ProbeMachine, config: VMConfig, image: BaseImage, state: VMDirectory
) -> MachineSpec:
    """Fill the directory like the directory of a VM, and return the machine."""
    profile, tools = machine.profile, machine.tools
    assert tools.firmware is not None
    parts = Parts(tools.firmware.vars_template, directories(profile))
    await in_thread(state.fill, qcow2.empty(image.virtual_size), parts)
    sidecars = tuple(name for name in profile.sidecars if name in machine.parts)
    return MachineSpec(config, tools, machine.accelerator, image.fd, sidecars)


def _with_network(machine: ProbeMachine, argv: list[str]) -> list[str]:
    """Make QEMU capture the network's packets; without a network, connect the card to nothing."""
    if NETWORK in machine.parts:
        return [*argv, *NETWORK_OPTIONS]
    return [NO_NETWORK if word.startswith(USER_NETWORK) else word for word in argv]


async def _watch(
    machine: ProbeMachine,
    state: VMDirectory,
    qemu: Child,
    monitor: Monitor,
    console: Console,
    started: float,
) -> Sighting:
    """Observe the guest until all results are known, the guest fails, or time is up."""
    name = machine.accelerator.name
    deadline = started + BOOT[name]
    capture = state.path / CAPTURE
    tried = False
    while True:
        failure = await _failure(qemu, monitor)
        console.drain()
        sighting = Sighting(
            name,
            console.text(),
            offered_address(capture.read_bytes() if capture.exists() else b""),
            failure,
            seconds=time.monotonic() - started,
        )
        if sighting.disk_tried and not tried:
            tried, deadline = True, time.monotonic() + DHCP
        done = tried if NETWORK not in machine.parts else tried and sighting.offered
        if done or failure or time.monotonic() > deadline:
            return sighting
        await asyncio.sleep(POLL)


async def _failure(qemu: Child, monitor: Monitor) -> str:
    """Return the reason why the guest no longer runs; empty if it runs."""
    try:
        status = (await monitor.execute("query-status"))["status"]
    except MonitorError as error:
        return str(error)
    except VMNotRunningError:
        await asyncio.wait([qemu.exited], timeout=EXIT)
        return _last_words(qemu)
    if status == "internal-error":
        return "the accelerator cannot run the guest any further (QEMU's status is internal-error)"
    return ""


def _last_words(qemu: Child) -> str:
    status = "QEMU closed its monitor"
    if qemu.ended:
        status = f"QEMU ended ({describe_exit(qemu.returncode)})"
    return f"{status}: {qemu.log.quote() or 'QEMU wrote nothing'}"
