"""Windows 11: a machine that meets the requirements of the Windows setup program."""

from __future__ import annotations

from smolvm_async.guests.profile import GuestProfile

# Enlightenments, as in QEMU's docs/system/i386/hyperv.rst, libvirt's win11 defaults and Proxmox's
# ostype=win11; hv_crash turns a blue screen into QEMU's GUEST_PANICKED event. Only KVM supports
# them: under TCG, QEMU exits if one of them, hv_vpindex, is set.
HYPER_V = (
    "hv_relaxed",
    "hv_vapic",
    "hv_spinlocks=0x1fff",
    "hv_vpindex",
    "hv_runtime",
    "hv_time",
    "hv_synic",
    "hv_stimer",
    "hv_stimer_direct",
    "hv_frequencies",
    "hv_tlbflush",
    "hv_ipi",
    "hv_crash",
)

WINDOWS = GuestProfile(
    name="windows",
    title="Windows",
    default_memory=4096,
    minimum_memory=2048,
    default_cpus=2,
    hosts=("linux",),
    firmware="always",
    firmware_features=frozenset({"secure-boot", "enrolled-keys", "requires-smm"}),
    # No HPET: Windows prefers the Hyper-V clock, and polling an HPET costs time (libvirt leaves the
    # HPET out, too).
    machine_type="q35",
    machine_options="smm=on,vmport=off,hpet=off",
    cpu={"kvm": ",".join(("host", *HYPER_V)), "tcg": "max"},
    # Secure Boot is safe only if nothing but SMM can write the variables, and S3 is off (for every
    # guest).
    globals=("driver=cfi.pflash01,property=secure,value=on",),
    accelerator_globals={"kvm": ("kvm-pit.lost_tick_policy=discard",)},
    rtc="base=localtime,driftfix=slew",  # Windows expects local time in the hardware clock
    sidecars=("swtpm",),
    shells=("raw", "cmd"),
    channels=("agent", "ssh"),
    features=frozenset({"commands", "processes", "detached", "files", "variables"}),
    agent="Install the guest tools of the virtio-win ISO (virtio-win-guest-tools.exe) in the image:"
    " they have the agent and the driver of its port. Or pass user= and password= or key=, if the "
    "image has an SSH server.",
    instead={
        "user": "Leave user= out; or pass password= or key= too, for an image with OpenSSH.",
        "ssh": "Pass user= and password= or key= to use the SSH server of an image that has one.",
    },
)
