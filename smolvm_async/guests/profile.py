"""What the library has to know of a guest operating system: pure data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from smolvm_async.errors import UnsupportedError


class GuestProfile(NamedTuple):
    """One guest OS. Adding one is one new file in this package.

    Attributes:
        name: What `os=` takes.
        title: What messages call it.
        default_memory: MiB.
        minimum_memory: MiB; the OS does not run with less.
        default_cpus: Cores of the one socket.
        hosts: Values of `sys.platform` under which it runs.
        firmware: Whether UEFI starts it: `always`, `never` (SeaBIOS, or a kernel that QEMU itself
            loads), or `image` if that depends on the image.
        firmware_features: What QEMU's firmware descriptor must offer (firmware.json).
        machine_type: QEMU's machine type; a kept VM stays with the version it was made with.
        machine_options: Options of `-machine`.
        cpu: Value of `-cpu`, by accelerator.
        globals: Values of `-global`, for every accelerator.
        accelerator_globals: Further ones, by accelerator.
        rtc: Value of `-rtc`.
        sidecars: Names in `smolvm_async.qemu.sidecars.SIDECARS`.
        devices: Values of further `-device` options.
        disk_bus: How it sees its disk: `scsi` (virtio-scsi) or `virtio` (virtio-blk, `/dev/vda`).
        login: How it is told who may log in over SSH: a `nocloud` seed for cloud-init, `fw_cfg`
            for the image that this library builds, or `none`: then nobody does.
        usb: Whether it has a USB controller, with the tablet that the mouse is.
        unsupported: For each feature that it lacks, the sentence that says so and what to do.
    """

    name: str
    title: str
    default_memory: int
    minimum_memory: int
    default_cpus: int
    hosts: tuple[str, ...]
    firmware: Literal["always", "image", "never"]
    firmware_features: frozenset[str]
    machine_type: str
    machine_options: str
    cpu: Mapping[str, str]
    globals: tuple[str, ...]
    rtc: str
    accelerator_globals: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    sidecars: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    disk_bus: Literal["scsi", "virtio"] = "scsi"
    login: Literal["none", "nocloud", "fw_cfg"] = "none"
    usb: bool = True
    unsupported: Mapping[str, str] = MappingProxyType({})

    def require(self, feature: str) -> None:
        """Refuse a feature that this guest OS lacks.

        Raises:
            UnsupportedError: It names the feature and the workaround.
        """
        if feature in self.unsupported:
            raise UnsupportedError(self.unsupported[feature])
