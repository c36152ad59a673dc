"""Windows 11: the machine that its set-up demands, and what its guests cannot do here."""

from __future__ import annotations

from smolvm_async.guests.profile import GuestProfile

# Enlightenments as QEMU's docs/system/i386/hyperv.rst, libvirt's win11 defaults and Proxmox's
# ostype=win11 have them; hv_crash turns a blue screen into QEMU's GUEST_PANICKED event.
# They are KVM's: under TCG hv_vpindex alone ends QEMU.
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
    # No HPET: Windows prefers the Hyper-V clock and polls a HPET at a cost (libvirt does the same).
    machine_type="q35",
    machine_options="smm=on,vmport=off,hpet=off",
    cpu={"kvm": ",".join(("host", *HYPER_V)), "tcg": "max"},
    globals=(
        # Secure Boot holds only if nothing but SMM writes the variables, and S3 is off.
        "driver=cfi.pflash01,property=secure,value=on",
        "ICH9-LPC.disable_s3=1",
    ),
    accelerator_globals={"kvm": ("kvm-pit.lost_tick_policy=discard",)},
    rtc="base=localtime,driftfix=slew",  # Windows keeps local time in the clock
    sidecars=("swtpm",),
    unsupported={
        "mounts": (
            "mounts= is not available for Windows guests: put the files into the image, "
            "or let the guest fetch them over its network (the host is 10.0.2.2 there)."
        ),
        "internet_settings": (
            "internet_settings= is not available for Windows guests: use Windows' own firewall "
            "or proxy settings inside the image, or filter on the host."
        ),
        "snapshot": (
            "snapshot() is not available for Windows guests: shut Windows down and keep a copy "
            "of its qcow2; image= never writes to it, so any number of VMs can start from it."
        ),
        "from_snapshot": (
            "from_snapshot() is not available for Windows guests: start a new VM with image= "
            "from a qcow2 that has Windows in the state you want."
        ),
        **{
            name: (
                f"{name}() is not available for Windows guests: install what is to run as a "
                "service or a scheduled task in the image."
            )
            for name in ("run", "run_stream")
        },
        **{
            name: (
                f"{name}() is not available for Windows guests: put the files into the image, or "
                "let the guest fetch and send them over its network (the host is 10.0.2.2 there)."
            )
            for name in ("upload_file", "download_file")
        },
        **{
            name: (
                f"{name}() is not available for Windows guests: set the variables inside the "
                "image (setx NAME VALUE)."
            )
            for name in ("set_env_vars", "unset_env_vars", "list_env_vars")
        },
        "env": (
            "env= is not available for Windows guests: set the variables inside the image "
            "(setx NAME VALUE)."
        ),
        "user": "user= is not available for Windows guests: the image has users of its own.",
        **{
            name: (
                f"{name}= is not available for Windows guests: their own boot loader starts them; "
                "pass image= alone."
            )
            for name in ("kernel", "initrd", "boot_args")
        },
    },
)
