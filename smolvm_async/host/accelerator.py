"""Which accelerator QEMU can use here, and if it is not KVM, why."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path
from typing import NamedTuple

# <linux/kvm.h>
KVM_GET_API_VERSION, KVM_CHECK_EXTENSION = 0xAE00, 0xAE03
KVM_CAP_X86_SMM = 117
KVM_API_VERSION = 12

LEAST_CODE, MOST_CODE = 128, 1024  # MiB of translated code; QEMU's own bound is the latter
OVERHEAD = 128  # MiB; QEMU 25 to 100 and swtpm 1, as PSS, more under TCG, which fills it slowly


class Problem(NamedTuple):
    """Why an accelerator cannot be used, and what to do about it: two sentences."""

    reason: str
    cure: str


class Accelerator(NamedTuple):
    """One of QEMU's accelerators: its name and the value of `-accel`."""

    name: str
    option: str

    def option_for(self, memory: int) -> str:
        """The value of `-accel` for a guest of so many MiB.

        TCG keeps the code that it has translated, by default up to 1 GiB of it for a guest of any
        size. A quarter of the guest's memory, at least 128 MiB, costs a small guest some 5 % of its
        speed, measured with 256 MiB and many Python programs: QEMU then has 345 MiB, not 613.
        """
        if self.name != "tcg":
            return self.option
        return f"{self.option},tb-size={_translated_code(memory)}"

    def overhead(self, memory: int) -> int:
        """MiB that the processes of such a VM may take besides the guest's memory."""
        return OVERHEAD + (_translated_code(memory) - LEAST_CODE if self.name == "tcg" else 0)


def _translated_code(memory: int) -> int:
    return min(max(memory // 4, LEAST_CODE), MOST_CODE)


KVM = Accelerator("kvm", "kvm")
TCG = Accelerator("tcg", "tcg,thread=multi")


def probe_kvm(
    device: Path = Path("/dev/kvm"), cpuinfo: Path = Path("/proc/cpuinfo"), *, smm: bool = True
) -> Problem | None:
    """`None` if KVM can run a guest here, one with Secure Boot if it has to have `smm`.

    It costs no process and under 2 ms. Creating a VM would tell nothing more: on a host that
    is itself a VM without nested virtualization that may succeed, and the guest then hang.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return Problem(
            f"this processor is {platform.machine()}, the guest is x86_64",
            "Use an x86_64 host.",
        )
    if not _has_virtualization(cpuinfo):
        return Problem(
            "the processor shows neither VT-x (vmx) nor AMD-V (svm): they are switched off, or "
            "this host is itself a VM without nested virtualization, where guests hang or die "
            f"even if {device} opens",
            "Switch virtualization on in the host's firmware set-up; for a VM, enable nested "
            "virtualization on its own host.",
        )
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Problem(
            f"{device} does not exist",
            "Load the kernel's module: sudo modprobe kvm_intel, or kvm_amd.",
        )
    except PermissionError:
        return Problem(
            f"{device} may not be opened by this user",
            "Run: sudo usermod -aG kvm $USER, and log in again.",
        )
    except OSError as error:
        return Problem(f"{device} cannot be opened: {error.strerror}", "Load kvm_intel or kvm_amd.")
    try:
        return _probe(fd, device, smm)
    finally:
        os.close(fd)


def _probe(fd: int, device: Path, smm: bool) -> Problem | None:
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
        has_smm = fcntl.ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_X86_SMM)
    except OSError as error:
        return Problem(f"{device} does not answer as KVM: {error.strerror}", "Reload kvm.")
    if version != KVM_API_VERSION:
        return Problem(f"{device} speaks KVM API {version}, not 12", "Update the host's kernel.")
    if smm and not has_smm:
        return Problem(
            "this KVM has no System Management Mode (SMM), which Secure Boot needs",
            "Use a kernel whose KVM is built with SMM (CONFIG_KVM_SMM), or another host.",
        )
    return None


def _has_virtualization(cpuinfo: Path) -> bool:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return True  # nothing speaks against it
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return "vmx" in flags or "svm" in flags
