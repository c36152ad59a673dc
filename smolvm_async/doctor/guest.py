"""Everything that one guest OS needs of the host, from its programs to a boot of its machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from smolvm_async.doctor import programs, space
from smolvm_async.doctor.accelerators import accelerator_verdict, kvm_verdict
from smolvm_async.doctor.findings import Check, Notebook, Verdict, failed, needs, ok, skipped
from smolvm_async.doctor.probe import DEADLINE, Machine, probe
from smolvm_async.doctor.verdicts import (
    NETWORK,
    Sighting,
    boot_verdict,
    disk_verdict,
    network_verdict,
    secure_boot_verdict,
    sidecar_verdict,
    smm_verdict,
)
from smolvm_async.guests import GuestProfile
from smolvm_async.host import Accelerator, Firmware, HostTools
from smolvm_async.host.accelerator import KVM, TCG, Problem, probe_kvm
from smolvm_async.host.distribution import OVMF, QEMU, QEMU_IMG, Program, how_to_install
from smolvm_async.host.firmware import descriptor_directories, find_firmware, places
from smolvm_async.qemu.sidecars import SIDECARS

DEVICE = "/dev/kvm"

# What only a boot shows, in the order in which it is found out.
BOOTED = ("kvm", "boot", "accelerator", "smm", "virtio-scsi", "secure-boot", NETWORK)


async def examine_guest(
    notebook: Notebook, profile: GuestProfile, data_dir: Path, accel: str, obstacle: str
) -> None:
    """Note what a guest of `profile` meets here; `obstacle` says why nothing can be run."""
    guest = profile.name
    if sys.platform not in profile.hosts:
        found = f"{profile.title} guests need a Linux host; this one is {sys.platform!r}"
        cure = "Use a Linux machine, or a Linux VM with nested virtualization."
        notebook.note("host", failed(found, cure), guest=guest)
        return
    check = partial(notebook.check, guest=guest)
    await check("memory", lambda: space.check_memory(profile))
    parts = {NETWORK}
    sidecars = [SIDECARS[name] for name in profile.sidecars]
    for sidecar in sidecars:
        work = partial(programs.check_sidecar, sidecar, data_dir)
        if await check(sidecar.program.name, work, obstacle=obstacle):
            parts.add(sidecar.program.name)
    needed: dict[str, Check] = {
        "qemu": programs.check_qemu,
        "qemu-img": lambda: programs.check_qemu_img(data_dir),
        "firmware": lambda: check_firmware(profile),
    }
    lacking = [
        name for name, work in needed.items() if not await check(name, work, obstacle=obstacle)
    ]
    obstacle = obstacle or ("" if not lacking else needs(*lacking))
    if obstacle:
        for name in (*BOOTED, *(sidecar.device for sidecar in sidecars)):
            notebook.note(name, skipped(obstacle), guest=guest)
        return
    probes = Probes(profile, frozenset(parts), data_dir, accel)
    await check("kvm", probes.kvm, deadline=DEADLINE["kvm"])
    await check("boot", probes.boot, deadline=DEADLINE["tcg"])
    for name, verdict in probes.conclusions():
        notebook.note(name, verdict, guest=guest)


async def check_firmware(profile: GuestProfile) -> Verdict:
    """Whether there is a firmware pair with the features that a guest OS needs."""
    firmware = _find_firmware(profile)
    if firmware is None:
        looked = ", ".join(places(descriptor_directories(os.environ)))
        features = ", ".join(sorted(profile.firmware_features))
        found = f"no UEFI firmware with {features} found in: {looked}"
        return failed(found, f"{how_to_install([OVMF])}.")
    return ok(f"{firmware.code} with {firmware.vars_template}")


def _find_firmware(profile: GuestProfile) -> Firmware | None:
    return find_firmware(profile.firmware_features, descriptor_directories(os.environ))


def _path(program: Program) -> Path:
    return Path(shutil.which(program.name) or program.name).absolute()


class Probes:
    """Boots a guest's machine under KVM if that can be, else under TCG; and what they show."""

    def __init__(
        self, profile: GuestProfile, parts: frozenset[str], data_dir: Path, accel: str
    ) -> None:
        firmware = _find_firmware(profile)
        assert firmware is not None, "it was just there"
        self._profile = profile
        self._tools = HostTools(
            qemu=_path(QEMU),
            qemu_img=_path(QEMU_IMG),
            firmware=firmware,
            sidecars={name: _path(SIDECARS[name].program) for name in profile.sidecars},
        )
        self._parts = parts
        self._data_dir = data_dir
        self._accel = accel
        self._problem: Problem | None = None
        self._seen: Sighting | None = None

    async def kvm(self) -> Verdict:
        """Boot under KVM, if it was not ruled out and can be opened."""
        if self._accel != "tcg":
            self._problem = probe_kvm()
            if os.access(DEVICE, os.R_OK | os.W_OK):
                self._seen = await self._probe(KVM)
        return kvm_verdict(self._accel, self._seen, self._problem)

    async def boot(self) -> Verdict:
        """Boot under TCG, unless the boot under KVM has shown everything."""
        if not self._kvm_works:
            self._seen = await self._probe(TCG)
        assert self._seen is not None
        return boot_verdict(self._seen)

    def conclusions(self) -> Iterator[tuple[str, Verdict]]:
        """What the boots have shown, by the name of the check."""
        yield "accelerator", accelerator_verdict(self._accel, self._kvm_works, self._problem)
        seen = self._seen or Sighting("no accelerator")
        assert self._tools.firmware is not None, "only guests with Secure Boot are examined"
        yield "smm", smm_verdict(seen, self._profile)
        yield "virtio-scsi", disk_verdict(seen)
        yield "secure-boot", secure_boot_verdict(seen, self._profile, self._tools.firmware)
        yield "user-network", network_verdict(seen)
        for name in self._profile.sidecars:
            sidecar = SIDECARS[name]
            works = name in self._parts
            yield sidecar.device, sidecar_verdict(seen, sidecar) if works else skipped(needs(name))

    @property
    def _kvm_works(self) -> bool:
        return self._seen is not None and self._seen.accelerator == "kvm" and self._seen.booted

    async def _probe(self, accelerator: Accelerator) -> Sighting:
        machine = Machine(self._profile, self._tools, accelerator, self._parts)
        return await probe(machine, self._data_dir)
