"""A guest operating system as pure data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from smolvm_async.errors import UnsupportedError
from smolvm_async.guests.features import FEATURES, NEEDED, FeatureName


class GuestProfile(NamedTuple):
    """One guest OS. A new one is a file in this folder and its name in `GUESTS`."""

    name: str  # the value of `os=`
    title: str  # the name in messages, as in "Windows guests"
    default_memory: int  # MiB
    minimum_memory: int  # MiB; the OS does not run with less
    default_cpus: int  # cores of the one socket
    hosts: tuple[str, ...]  # values of `sys.platform` under which the guest runs
    # UEFI starts the guest `always`, `never` (SeaBIOS does, or QEMU itself loads a kernel), or if
    # the `image` needs it.
    firmware: Literal["always", "image", "never"]
    firmware_features: frozenset[str]  # that QEMU's firmware descriptor must list (firmware.json)
    machine_type: str  # QEMU's; a kept VM stays with the version it was made with
    machine_options: str  # of `-machine`
    cpu: Mapping[str, str]  # the value of `-cpu`, by accelerator
    globals: tuple[str, ...]  # values of `-global`, for every accelerator
    rtc: str  # the value of `-rtc`
    # Further values of `-global`, by accelerator.
    accelerator_globals: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    sidecars: tuple[str, ...] = ()  # names in `smolvm_async.qemu.sidecars.SIDECARS`
    devices: tuple[str, ...] = ()  # values of further `-device` options
    disk_bus: Literal["scsi", "virtio"] = "scsi"  # virtio-scsi, or virtio-blk (`/dev/vda`)
    # The guest gets its SSH keys from a `nocloud` seed for cloud-init, or from `fw_cfg` (the image
    # that this library builds); `none`: nobody logs in.
    login: Literal["none", "nocloud", "fw_cfg"] = "none"
    usb: bool = True  # a USB controller, with the tablet that serves as the mouse
    features: frozenset[FeatureName] = frozenset()  # all others are refused
    planned: frozenset[FeatureName] = frozenset()  # lacking in this version alone, as errors say
    # Advice for features that the guest lacks, where that of `FEATURES` does not fit.
    instead: Mapping[FeatureName, str] = MappingProxyType({})

    def require(self, name: str) -> None:
        """Raise an `UnsupportedError` if the guest OS lacks what a method or an argument needs."""
        if NEEDED[name] not in self.features:
            raise self.refusal(name)

    def refusal(self, name: str) -> UnsupportedError:
        """Return the error for a method or an argument that this guest OS lacks."""
        feature = NEEDED[name]
        spelled = f"{name}=" if name in FEATURES[feature].arguments else f"{name}()"
        how = "in this version yet" if feature in self.planned else "available"
        instead = self.instead.get(feature, FEATURES[feature].instead)
        return UnsupportedError(f"{spelled} is not {how} for {self.title} guests.", hint=instead)
