"""The examination: all checks in order, including the checks that boot a guest's machine.

To add a check, write a function that returns a `Verdict` and add a row for it: in `Boots.checks`
here if the check needs a boot of the firmware, otherwise in `checks.py`.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Literal

from smolvm_async.config.options import make_config
from smolvm_async.doctor import verdicts
from smolvm_async.doctor.checks import (
    check_built_in_linux,
    find_pair,
    guest_checks,
    host_checks,
)
from smolvm_async.doctor.findings import Check, Notebook, Report, Verdict, failed
from smolvm_async.doctor.probe import ProbeMachine, probe, probe_deadline
from smolvm_async.doctor.verdicts import NETWORK, Sighting
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.foundation.tasks import running_loop
from smolvm_async.guests import GUESTS, GuestProfile
from smolvm_async.host.accelerator import KVM, TCG, Accelerator, Problem, probe_kvm, trusts_tsc
from smolvm_async.host.distribution import QEMU, QEMU_IMG, Program
from smolvm_async.host.firmware import Firmware
from smolvm_async.host.tools import HostTools
from smolvm_async.qemu.sidecars import SIDECARS

DEVICE = "/dev/kvm"


async def examine(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    accel: Literal["auto", "kvm", "tcg"] = "auto",
    on_progress: ProgressCallback | None = None,
) -> Report:
    """Examine this host. This takes some seconds. A cancelled call leaves no files or processes.

    Args:
        data_dir: The directory for the files of VMs; by default, the same as for a VM.
        accel: The `accel=` of the VMs that are going to run on this host.
        on_progress: Called with a `Progress` for each check.

    Returns:
        The findings. An error inside a check becomes a finding.

    Raises:
        ConfigError: An argument is wrong.
    """
    running_loop()
    config = make_config(accel=accel, data_dir=data_dir)  # checks both arguments as a VM does
    notebook = Notebook(on_progress)
    await notebook.run(host_checks(config.data_dir))
    for profile in GUESTS.values():
        # Skip the other guests: a guest with UEFI firmware needs everything that they need.
        if profile.firmware == "always":
            await examine_guest(notebook, profile, config.data_dir, accel)
    await notebook.run([Check("built-in-image", check_built_in_linux)], GUESTS["linux"].name)
    return Report(findings=tuple(notebook.findings))


async def examine_guest(
    notebook: Notebook, profile: GuestProfile, data_dir: Path, accel: str
) -> None:
    """Check everything that one guest OS needs, from its programs to a boot of its machine."""
    if sys.platform not in profile.hosts:
        found = f"{profile.title} guests need a Linux host; this host is {sys.platform!r}"
        cure = "Use a Linux machine, or a Linux VM with nested virtualization."
        await notebook.run([Check("host", lambda: failed(found, cure))], profile.name)
        return
    await notebook.run(guest_checks(profile, data_dir), profile.name)
    sidecars = [name for name in profile.sidecars if notebook.passed(name)]
    boots = Boots(profile, frozenset({NETWORK, *sidecars}), data_dir, accel)
    await notebook.run(boots.checks(), profile.name)


class Boots:
    """The boots of a guest's machine: under KVM if possible, else under TCG."""

    def __init__(
        self, profile: GuestProfile, parts: frozenset[str], data_dir: Path, accel: str
    ) -> None:
        self._profile = profile
        self._parts = parts
        self._data_dir = data_dir
        self._accel = accel
        self._problem: Problem | None = None
        self._seen: Sighting | None = None

    def checks(self) -> list[Check]:
        """Return the checks that boot the machine or draw conclusions from its boots."""
        needs = ("qemu", "qemu-img", "firmware")
        return [
            Check("kvm", self._kvm, needs, probe_deadline(KVM, self._parts)),
            Check("boot", self._boot, needs, probe_deadline(TCG, self._parts)),
            Check("accelerator", self._accelerator, needs),
            Check("smm", lambda: verdicts.smm(self._sighting, self._profile), needs),
            Check("virtio-scsi", lambda: verdicts.disk(self._sighting), needs),
            Check("secure-boot", self._secure_boot, needs),
            Check(NETWORK, lambda: verdicts.network(self._sighting), needs),
            *(self._sidecar(name, needs) for name in self._profile.sidecars),
        ]

    async def _kvm(self) -> Verdict:
        """Boot under KVM, unless accel='tcg' rules KVM out or KVM cannot be opened."""
        if self._accel != "tcg":
            self._problem = probe_kvm()
            if os.access(DEVICE, os.R_OK | os.W_OK):
                self._seen = await self._probe(KVM)
        return verdicts.kvm(self._accel, self._seen, self._problem, tsc=trusts_tsc())

    async def _boot(self) -> Verdict:
        """Boot under TCG, unless the machine has booted under KVM."""
        if not self._kvm_works:
            self._seen = await self._probe(TCG)
        return verdicts.boot(self._sighting)

    def _accelerator(self) -> Verdict:
        return verdicts.accelerator(self._accel, self._kvm_works, self._problem)

    def _secure_boot(self) -> Verdict:
        return verdicts.secure_boot(self._sighting, self._profile, self._firmware)

    def _sidecar(self, name: str, needs: tuple[str, ...]) -> Check:
        sidecar = SIDECARS[name]
        return Check(
            sidecar.device, lambda: verdicts.sidecar(self._sighting, sidecar), (*needs, name)
        )

    @property
    def _sighting(self) -> Sighting:
        return self._seen or Sighting("no accelerator")

    @property
    def _kvm_works(self) -> bool:
        return self._sighting.accelerator == "kvm" and self._sighting.booted

    @property
    def _firmware(self) -> Firmware:
        firmware = find_pair(self._profile)
        assert firmware is not None, "the check `firmware` has found a firmware pair"
        return firmware

    async def _probe(self, accelerator: Accelerator) -> Sighting:
        sidecars = {name: _path(SIDECARS[name].program) for name in self._profile.sidecars}
        tools = HostTools(_path(QEMU), _path(QEMU_IMG), self._firmware, sidecars)
        machine = ProbeMachine(self._profile, tools, accelerator, self._parts)
        return await probe(machine, self._data_dir)


def _path(program: Program) -> Path:
    return Path(shutil.which(program.name) or program.name).absolute()
