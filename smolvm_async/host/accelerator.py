"""QEMU's accelerators, and a check of whether this host can use KVM."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from pathlib import Path
from typing import NamedTuple

# <linux/kvm.h>
KVM_GET_API_VERSION, KVM_CHECK_EXTENSION = 0xAE00, 0xAE03
KVM_CAP_X86_SMM = 117
KVM_API_VERSION = 12

LEAST_CODE, MOST_CODE = 128, 1024  # MiB of translated code; QEMU's default is at most 1024
OVERHEAD = 128  # MiB besides the guest's memory; measured (PSS): QEMU 25 to 100, swtpm 1


PASS_DEVICE = (
    "Pass the device on: docker run --device /dev/kvm; systemd: PrivateDevices=no, or "
    "DeviceAllow=/dev/kvm rw."
)


class Problem(NamedTuple):
    """The reason why an accelerator cannot be used (text without a period), and the fix."""

    reason: str
    cure: str


class Accelerator(NamedTuple):
    """A QEMU accelerator: its name and the value of `-accel`."""

    name: str
    option: str

    def option_for(self, memory: int) -> str:
        """Return the value of `-accel` for a guest with `memory` MiB.

        TCG keeps translated code: by default up to 1 GiB, even for a small guest. Here the limit
        is a quarter of the guest's memory, but at least 128 MiB. In a measurement with a 256 MiB
        guest and many Python programs, this limit made the guest 5 % slower, and QEMU used 345 MiB
        instead of 613 MiB.
        """
        if self.name != "tcg":
            return self.option
        return f"{self.option},tb-size={_translated_code(memory)}"

    def overhead(self, memory: int) -> int:
        """Return the MiB that QEMU and its sidecars may use besides the guest's `memory` MiB.

        Under TCG, the translated code grows slowly to its limit.
        """
        return OVERHEAD + (_translated_code(memory) - LEAST_CODE if self.name == "tcg" else 0)


def _translated_code(memory: int) -> int:
    return min(max(memory // 4, LEAST_CODE), MOST_CODE)


KVM = Accelerator("kvm", "kvm")
TCG = Accelerator("tcg", "tcg,thread=multi")


def probe_kvm(
    device: Path = Path("/dev/kvm"),
    cpuinfo: Path = Path("/proc/cpuinfo"),
    modules: Path = Path("/sys/module"),
    *,
    smm: bool = True,
) -> Problem | None:
    """Return the problem with KVM on this host; `None` if KVM can run a guest.

    This takes under 2 ms and starts no process. Creating a VM would not prove more: on a host that
    is itself a VM without nested virtualization, this may succeed although the guest hangs later.

    `smm` says whether the guest needs System Management Mode, as Secure Boot does.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return Problem(
            f"this processor is {platform.machine()}, the guest is x86_64",
            "Use an x86_64 host.",
        )
    if not _has_virtualization(cpuinfo):
        return Problem(
            "the processor reports neither VT-x (vmx) nor AMD-V (svm): virtualization is switched "
            "off, or this host is itself a VM without nested virtualization, where guests hang or "
            f"die even if {device} can be opened",
            "Enable virtualization in the host's firmware settings; if this host is a VM, enable "
            "nested virtualization on the machine that runs it.",
        )
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if any((modules / name).exists() for name in ("kvm_intel", "kvm_amd")):
            return Problem(
                f"{device} does not exist here, although this kernel has loaded KVM", PASS_DEVICE
            )
        return Problem(
            f"{device} does not exist",
            "Load the module: sudo modprobe kvm_intel (Intel) or sudo modprobe kvm_amd (AMD).",
        )
    except PermissionError as error:
        if error.errno == errno.EPERM:  # by a cgroup; the modes of a file would give EACCES
            return Problem(f"this container or service may not open {device}", PASS_DEVICE)
        return Problem(
            f"this user may not open {device}",
            "Run: sudo usermod -aG kvm $USER, and log in again.",
        )
    except OSError as error:
        return Problem(
            f"{device} cannot be opened: {error.strerror}",
            "Load the module: sudo modprobe kvm_intel (Intel) or sudo modprobe kvm_amd (AMD).",
        )
    try:
        return _probe(fd, device, smm)
    finally:
        os.close(fd)


def _probe(fd: int, device: Path, smm: bool) -> Problem | None:
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
        has_smm = fcntl.ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_X86_SMM)
    except OSError as error:
        return Problem(
            f"{device} does not answer as KVM: {error.strerror}",
            "Reload the KVM module: sudo modprobe -r kvm_intel && sudo modprobe kvm_intel "
            "(on AMD: kvm_amd).",
        )
    if version != KVM_API_VERSION:
        return Problem(
            f"{device} has KVM API version {version}; version {KVM_API_VERSION} is required",
            "Update the host's kernel.",
        )
    if smm and not has_smm:
        return Problem(
            "this KVM has no System Management Mode (SMM), which Secure Boot needs",
            "Use a kernel whose KVM is built with SMM (CONFIG_KVM_SMM), or another host.",
        )
    return None


def trusts_tsc(
    clocksources: Path = Path("/sys/devices/system/clocksource/clocksource0"),
) -> bool:
    """Return whether the host's kernel trusts its TSC, as it does on a usual machine.

    Without it, a restored guest of KVM has another TSC than before, and its timer fires only when
    this TSC has reached the old one: the guest stands still for as long as it ran before. So it is
    under a KVM that QEMU emulates; no real machine of this kind was tried.
    """
    try:
        return "tsc" in (clocksources / "available_clocksource").read_text().split()
    except OSError:  # this is no evidence of anything
        return True


def _has_virtualization(cpuinfo: Path) -> bool:
    try:
        with cpuinfo.open() as lines:  # of a big host, only the first processor's lines are read
            flags = next((line for line in lines if line.startswith("flags")), "").split()
    except OSError:
        return True  # unknown: let the other checks decide
    return "vmx" in flags or "svm" in flags
