"""Linux: the user's images, and the Debian image that this library builds.

The built-in image is tuned for a short boot under TCG; `benchmarks/linux.py` measures the gain of
each setting.
"""

from __future__ import annotations

from smolvm_async.guests.features import FEATURES
from smolvm_async.guests.profile import GuestProfile

# The slot for the devices of `mounts=`: see `qemu/mounts.py`. All Linux machines have one, so that
# clones of any snapshot can have mounts.
MOUNTS = "pcie-root-port,id=mounts,chassis=1,slot=1"

LINUX = GuestProfile(
    name="linux",
    title="Linux",
    default_memory=512,
    minimum_memory=128,
    default_cpus=1,  # under TCG, a second core makes the boot slower
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
    devices=(MOUNTS,),
    features=frozenset(FEATURES) - {"account"},
    agent="Install the package qemu-guest-agent in the image, or leave channel= out: that is SSH.",
)

DEBIAN = LINUX._replace(
    title="built-in Linux",
    firmware="never",
    machine_options="smbus=off,sata=off,vmport=off,hpet=off",
    cpu={"kvm": "host", "tcg": "qemu64,+rdrand"},
    # Its initramfs has the driver of `pvpanic-pci`, not of `pvpanic`.
    devices=("pvpanic-pci", MOUNTS),
    login="fw_cfg",
    channels=("ssh",),
    usb=False,  # loading the USB drivers would make the boot longer
)
