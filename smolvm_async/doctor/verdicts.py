"""Draw conclusions from the observations of one boot of the firmware.

The functions are pure, but `boot` and `kvm` look up QEMU's message in `host.restrictions`.

The firmware reports each boot entry that it tries, and the result, on the serial console.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from smolvm_async.doctor.findings import Verdict, blamed, failed, ok, skipped, warning
from smolvm_async.doctor.unsigned import MARKER
from smolvm_async.errors import HostError
from smolvm_async.foundation.tail import printable
from smolvm_async.guests import GuestProfile
from smolvm_async.host.accelerator import Problem
from smolvm_async.host.distribution import OVMF, QEMU, how_to_install
from smolvm_async.host.firmware import Firmware
from smolvm_async.host.restrictions import find_cause
from smolvm_async.host.tools import choose_accelerator
from smolvm_async.qemu.sidecars import Sidecar

NETWORK = "user-network"  # a part of the machine that some builds of QEMU do not have
DISK_ENTRY = r"BdsDxe: loading Boot\d+ [^\n]*Scsi\("
REFUSAL = r"BdsDxe: failed to (?:load|start) Boot\d+ [^\n]*Scsi\([^\n]*: ([A-Z][A-Za-z ]+)"
FORBIDDEN = ("Access Denied", "Security Violation")
PXE = "Start PXE over IPv4"
TAIL = 500  # characters of the console that a finding quotes

PCAP_HEADER, PCAP_RECORD = 24, struct.Struct("=4I")  # QEMU writes in the host's byte order
IPV4_UDP = re.compile(rb".{12}\x08\x00(.).{8}\x11", re.DOTALL)
BOOTPS = 67

TESTED_KVM = (
    "Linux 6.1 on an AMD processor that QEMU 7.2 emulates; not on Intel, not on a real machine"
)

USE_TCG = "Pass accel='tcg': software emulation, many times slower."
NO_TSC = (
    "the host's kernel does not trust its TSC: a guest that was saved and is restored (a snapshot, "
    "a fork, a warm start) stands still at first, for as long as it ran before it was saved"
)
TRUST_TSC = (
    "See the kernel's reason: dmesg | grep -i tsc. If this host is a VM, its hypervisor may lack "
    "an invariant TSC; if the processors' TSCs agree, boot the kernel with tsc=reliable. Or boot "
    "guests: boot='cold'."
)
GOOD_KVM = (
    "Use a host whose KVM runs guests: a real machine, or a VM with nested virtualization. "
    f"Until then: {USE_TCG}"
)


class Sighting(NamedTuple):
    """The observations of one boot.

    Attributes:
        offered: The address that QEMU's DHCP server offered the guest; empty without an offer.
        failure: The reason why the boot ended by itself, in QEMU's words; empty if it did not.
        refused: The parts of the machine that QEMU refused, with the error message for each part.
        seconds: The duration of the observation.
    """

    accelerator: str
    console: str = ""
    offered: str = ""
    failure: str = ""
    refused: Mapping[str, str] = MappingProxyType({})
    seconds: float = 0.0

    @property
    def booted(self) -> bool:
        """True if the firmware reached its boot entries."""
        return "BdsDxe: " in self.console or bool(self.offered)

    @property
    def unsigned_ran(self) -> bool:
        """True if the unsigned program was executed."""
        return MARKER in self.console

    @property
    def disk_error(self) -> str:
        """The error of the disk's boot entry; empty if the entry has not failed (yet)."""
        match = re.search(REFUSAL, self.console)
        return match[1].strip() if match else ""

    @property
    def disk_tried(self) -> bool:
        """True if the firmware has tried to boot from the disk."""
        return self.unsigned_ran or bool(self.disk_error)

    def why_not(self) -> str:
        """Return the reason why the firmware has not `booted`, without a full stop."""
        if self.failure:
            return self.failure
        tail = printable(self.console)[-TAIL:].strip()
        said = f"its console ends with {tail!r}" if tail else "its serial console stayed empty"
        return f"the firmware did not reach its boot entries within {self.seconds:.0f} s; {said}"


def offered_address(capture: bytes) -> str:
    """Return the first address that a DHCP server offered; empty without an offer.

    QEMU may still be writing the pcap file, so the last record may be incomplete.
    """
    position = PCAP_HEADER
    while position + PCAP_RECORD.size <= len(capture):
        *_, length, _ = PCAP_RECORD.unpack_from(capture, position)
        position += PCAP_RECORD.size
        frame = capture[position : position + length]
        position += length
        if match := IPV4_UDP.match(frame):
            udp = frame[14 + (match[1][0] & 15) * 4 :]
            reply, address = udp[8:9] == b"\2", udp[24:28]  # BOOTP's op and yiaddr
            from_server = udp[:2] == BOOTPS.to_bytes(2, "big")
            if from_server and reply and len(address) == 4 and any(address):
                return socket.inet_ntoa(address)
    return ""


def boot(sighting: Sighting) -> Verdict:
    """Conclude whether the machine runs its firmware at all."""
    accelerator = sighting.accelerator.upper()
    if sighting.booted:
        return ok(f"the firmware booted under {accelerator} in {sighting.seconds:.1f} s")
    found = f"the firmware did not boot under {accelerator}: {sighting.why_not()}"
    if sighting.failure:
        return blamed(found)
    return failed(
        found,
        "Reinstall QEMU and its firmware, both from one distribution. "
        f"{how_to_install([QEMU, OVMF])}.",
    )


def smm(sighting: Sighting, profile: GuestProfile) -> Verdict:
    """Conclude whether System Management Mode (SMM) works. Secure Boot depends on SMM."""
    if "requires-smm" not in profile.firmware_features:
        return skipped(f"{profile.title} guests do not need System Management Mode")
    if sighting.booted:
        return ok("the firmware, which hangs without SMM, booted")
    return skipped("the firmware did not boot")


def disk(sighting: Sighting) -> Verdict:
    """Conclude whether the firmware read the disk on the virtio-scsi controller."""
    if not sighting.booted:
        return skipped("the firmware did not boot")
    if sighting.unsigned_ran or sighting.disk_error in FORBIDDEN:
        return ok("the firmware read a program from a qcow2 on virtio-scsi")
    if sighting.disk_error:
        found = f"the firmware could not read the virtio-scsi disk: {sighting.disk_error}"
    elif re.search(DISK_ENTRY, sighting.console):
        found = "the firmware started to read the virtio-scsi disk and did not finish"
    else:
        found = "the firmware did not find the virtio-scsi disk"
    cure = f"Use a firmware with virtio-scsi drivers. {how_to_install([OVMF])}."
    return failed(found, cure)


def secure_boot(sighting: Sighting, profile: GuestProfile, firmware: Firmware) -> Verdict:
    """Conclude whether Secure Boot refuses an unsigned program."""
    if "secure-boot" not in profile.firmware_features:
        return skipped(f"{profile.title} guests do not need Secure Boot")
    if sighting.unsigned_ran:
        return failed(
            f"Secure Boot is not enforced: with {firmware.vars_template}, "
            "the firmware ran an unsigned program",
            "Use UEFI variables with Microsoft's keys, and remove the firmware descriptor in "
            "/etc/qemu/firmware or ~/.config/qemu/firmware that names other variables. "
            f"{how_to_install([OVMF])}.",
        )
    if sighting.disk_error in FORBIDDEN:
        return ok(f"the firmware refused an unsigned program: {sighting.disk_error}")
    return skipped("the firmware did not reach the unsigned program")


def network(sighting: Sighting) -> Verdict:
    """Conclude whether QEMU's user-mode network answers the guest."""
    if words := sighting.refused.get(NETWORK):
        return failed(
            f"QEMU has no user-mode network: {words}",
            f"Install a QEMU that was built with slirp. {how_to_install([QEMU])}.",
        )
    if sighting.offered:
        return ok(f"QEMU's DHCP server offered {sighting.offered} to the firmware")
    if not sighting.booted:
        return skipped("the firmware did not boot")
    if PXE in sighting.console:
        return failed(
            "the firmware asked for an address, and QEMU's DHCP server did not answer",
            f"Reinstall QEMU and libslirp. {how_to_install([QEMU])}.",
        )
    return warning(
        "QEMU provides the network, but the firmware did not try it, so no packet was seen",
        "If the network works in a guest, ignore this warning.",
    )


def sidecar(sighting: Sighting, sidecar: Sidecar) -> Verdict:
    """Conclude whether QEMU works with a sidecar."""
    name = sidecar.program.name
    if words := sighting.refused.get(name):
        return failed(
            f"QEMU does not work with {name}: {words}",
            f"Install a QEMU that was built with support for {name}. "
            f"{how_to_install([QEMU, sidecar.program])}.",
        )
    if sighting.booted:
        return ok(f"the firmware booted with {name}")
    return skipped("the firmware did not boot")


def kvm(
    accel: str, sighting: Sighting | None, problem: Problem | None, *, tsc: bool = True
) -> Verdict:
    """Conclude whether KVM runs guests. `sighting` is `None` if KVM cannot be opened.

    `problem` is the reason why accel='auto' does not choose KVM; `None` if it chooses KVM. `tsc`
    is whether the host's kernel trusts its TSC.
    """
    if accel == "tcg":
        return skipped("accel='tcg' does not use KVM")
    if sighting is not None and sighting.booted:
        found = f"the firmware booted under KVM in {sighting.seconds:.1f} s"
        if problem is not None:
            reason = f"accel='auto' does not choose KVM: {problem.reason}"
            return warning(f"{found}, but {reason}", USE_TCG)
        if not tsc:
            return warning(f"{found}, but {NO_TSC}", TRUST_TSC)
        return ok(f"{found} (this library is tested with {TESTED_KVM})")
    reasons = []
    cause = find_cause(sighting.failure) if sighting is not None else None
    if cause is not None:
        reasons.append(cause.reason)
    if sighting is not None:
        reasons.append(f"KVM can be opened but does not run guests: {sighting.why_not()}")
    if problem is not None:
        reasons.append(problem.reason)
    found = "; ".join(reasons) or "KVM cannot be opened"
    cure = (cause or problem or Problem("", GOOD_KVM)).cure
    return (failed if accel == "kvm" or problem is None else warning)(found, cure)


def accelerator(accel: str, kvm_works: bool, problem: Problem | None) -> Verdict:
    """Conclude which accelerator guests get if they ask for `accel`, and whether it works."""
    try:
        chosen, _ = choose_accelerator(accel)
    except HostError as error:
        return failed(str(error), USE_TCG)
    if chosen.name == accel == "tcg":
        return ok("accel='tcg' selects TCG: software emulation, many times slower than KVM")
    if chosen.name == "tcg":
        reason = f": {problem.reason}" if problem is not None else ""
        return warning(
            f"accel={accel!r} selects TCG on this host (software emulation, "
            f"far slower than KVM){reason}",
            f"{problem.cure if problem is not None else GOOD_KVM} "
            "accel='tcg' silences this warning.",
        )
    if not kvm_works:
        return failed(
            f"accel={accel!r} selects KVM on this host, but KVM does not run guests", USE_TCG
        )
    return ok(f"accel={accel!r} selects KVM on this host, and KVM works")
