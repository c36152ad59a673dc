"""A guest operating system as pure data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from smolvm_async.errors import UnsupportedError
from smolvm_async.guests.features import FEATURES, NEEDED, FeatureName


class GuestProfile(NamedTuple):
    """One guest OS. A new one is a file in this folder and its name in `GUESTS`.

    Attributes:
        name: The value of `os=`.
        title: The name in messages, as in "Windows guests".
        default_memory: MiB.
        minimum_memory: MiB; the OS does not run with less.
        default_cpus: Cores of the one socket.
        hosts: Values of `sys.platform` under which the guest runs.
        firmware: Whether UEFI starts the guest: `always`, `never` (SeaBIOS, or a kernel that QEMU
            itself loads), or `image` if that depends on the image.
        firmware_features: Features that QEMU's firmware descriptor must list (firmware.json).
        machine_type: QEMU's machine type; a kept VM stays with the version it was made with.
        machine_options: Options of `-machine`.
        cpu: Value of `-cpu`, by accelerator.
        globals: Values of `-global`, for every accelerator.
        accelerator_globals: Further values of `-global`, by accelerator.
        rtc: Value of `-rtc`.
        sidecars: Names in `smolvm_async.qemu.sidecars.SIDECARS`.
        devices: Values of further `-device` options.
        disk_bus: The bus of the disk: `scsi` (virtio-scsi) or `virtio` (virtio-blk, `/dev/vda`).
        login: The way the guest gets its SSH keys: from a `nocloud` seed for cloud-init,
            from `fw_cfg` (the image that this library builds), or `none`: nobody logs in.
        usb: Whether there is a USB controller, with the tablet that serves as the mouse.
        features: The features that this guest OS has. All others are refused.
        planned: Features that the guest lacks in this version alone; their refusal says so.
        instead: Advice for features that the guest lacks, where `FEATURES` does not fit.
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
    features: frozenset[FeatureName] = frozenset()
    planned: frozenset[FeatureName] = frozenset()
    instead: Mapping[FeatureName, str] = MappingProxyType({})

    def require(self, name: str) -> None:
        """Check that the guest OS has the feature behind a method or an argument.

        Raises:
            UnsupportedError: It names the method or the argument and the workaround.
        """
        if NEEDED[name] not in self.features:
            raise self.refusal(name)

    def refusal(self, name: str) -> UnsupportedError:
        """Return the error for a method or an argument that this guest OS lacks."""
        feature = NEEDED[name]
        spelled = f"{name}=" if name in FEATURES[feature].arguments else f"{name}()"
        how = "in this version yet" if feature in self.planned else "available"
        instead = self.instead.get(feature, FEATURES[feature].instead)
        return UnsupportedError(f"{spelled} is not {how} for {self.title} guests.", hint=instead)
