"""Linux: images with a boot loader or a kernel of their own, and the one that this library builds.

The second is tuned for a short boot under TCG; `benchmarks/linux.py` measures what each piece of
that gains.
"""

from __future__ import annotations

from smolvm_async.guests.profile import GuestProfile

LATER = {
    "mounts": "mounts= is not in this version yet for Linux guests: use upload_file() instead.",
    "internet_settings": (
        "internet_settings= is not in this version yet for Linux guests: use the guest's own "
        "firewall (nftables), or filter on the host."
    ),
    "snapshot": (
        "snapshot() is not in this version yet for Linux guests: pass keep=True, and the VM keeps "
        "its disk when it stops."
    ),
    "from_snapshot": (
        "from_snapshot() is not in this version yet for Linux guests, and not available for "
        "Windows guests: keep a VM with keep=True and find it again with from_id(), or start a "
        "new one with image= from a qcow2 in the state you want."
    ),
}

LINUX = GuestProfile(
    name="linux",
    title="Linux",
    default_memory=512,
    minimum_memory=128,
    default_cpus=1,  # under TCG, a second one makes a boot longer
    hosts=("linux",),
    firmware="image",
    firmware_features=frozenset(),
    machine_type="q35",
    machine_options="vmport=off,hpet=off",
    cpu={"kvm": "host", "tcg": "max"},
    globals=(),
    rtc="base=utc,driftfix=slew",
    accelerator_globals={"kvm": ("kvm-pit.lost_tick_policy=discard",)},
    disk_bus="virtio",
    login="nocloud",
    unsupported=LATER,
)

DEBIAN = LINUX._replace(
    title="the built-in Debian",
    firmware="never",
    machine_options="smbus=off,sata=off,vmport=off,hpet=off",
    cpu={"kvm": "host", "tcg": "qemu64,+rdrand"},
    login="fw_cfg",
    usb=False,  # Debian's kernel for clouds has no driver for it
)
