"""The description of a guest operating system, as pure data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from smolvm_async.errors import UnsupportedError
from smolvm_async.guests.features import (
    FEATURES,
    NEED_SSH,
    NEEDED,
    OF_ACCOUNTS,
    Channel,
    FeatureName,
)


class GuestProfile(NamedTuple):
    """One guest OS. To add a guest OS, add a file to this folder and its profile to `GUESTS`."""

    name: str  # the value of `os=`
    title: str  # the name in messages, as in "Windows guests"
    default_memory: int  # MiB
    minimum_memory: int  # MiB; the OS does not run with less
    default_cpus: int  # cores, all in one socket
    hosts: tuple[str, ...]  # values of `sys.platform` under which the guest runs
    # When UEFI starts the guest: `always`, `never` (SeaBIOS starts it, or QEMU loads a kernel), or
    # only if the `image` needs UEFI.
    firmware: Literal["always", "image", "never"]
    firmware_features: frozenset[str]  # the firmware's descriptor must list them (firmware.json)
    machine_type: str  # QEMU's machine type; a kept VM always keeps its version
    machine_options: str  # further options of `-machine`
    cpu: Mapping[str, str]  # the value of `-cpu`, by accelerator
    globals: tuple[str, ...]  # values of `-global`, for every accelerator
    rtc: str  # the value of `-rtc`
    # Further values of `-global`, by accelerator.
    accelerator_globals: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    sidecars: tuple[str, ...] = ()  # names in `smolvm_async.qemu.sidecars.SIDECARS`
    devices: tuple[str, ...] = ()  # values of further `-device` options
    disk_bus: Literal["scsi", "virtio"] = "scsi"  # virtio-scsi, or virtio-blk (`/dev/vda`)
    # The source of the guest's SSH keys: a `nocloud` seed for cloud-init, or `fw_cfg` for the image
    # that this library builds. An `image` has an SSH server and accounts of its own. With `none`,
    # SSH cannot be used.
    login: Literal["none", "nocloud", "fw_cfg", "image"] = "none"
    shells: tuple[str, ...] = ("raw", "login")  # the values of `run()`'s `shell=`
    channels: tuple[Channel, ...] = ("ssh", "agent")  # the ways to run commands; the default first
    agent: str = ""  # how the guest agent gets into an image, for messages
    usb: bool = True  # a USB controller, with the tablet that serves as the mouse
    features: frozenset[FeatureName] = frozenset()  # supported; using any other raises an error
    # Advice for missing features, if the advice in `FEATURES` does not fit this guest OS.
    instead: Mapping[FeatureName, str] = MappingProxyType({})

    @property
    def makes_keys(self) -> bool:
        """Whether the library makes the keys of the guest's SSH server and of its user."""
        return self.login in ("nocloud", "fw_cfg")

    def over(self, channel: Channel | None) -> GuestProfile:
        """Return the profile of this guest OS if the library uses this channel to the guest.

        Raises:
            UnsupportedError: The guest OS does not have this channel.
        """
        if channel is None or channel == self.channels[0]:
            return self
        if channel not in self.channels:
            raise UnsupportedError(
                f"channel={channel!r} is not available for {self.title} guests.",
                hint="Leave channel= out.",
            )
        profile = self._replace(title=f"{self.title} (channel={channel!r})", channels=(channel,))
        if channel == "ssh":
            features = self.features - {"detached"} | OF_ACCOUNTS
            return profile._replace(login="image", features=features)
        return profile._replace(login="none", features=self.features - NEED_SSH)

    def require(self, name: str) -> None:
        """Raise an `UnsupportedError` if the guest OS does not support a method or an argument."""
        if NEEDED[name] not in self.features:
            raise self.refusal(name)

    def without_agent(self, name: str) -> UnsupportedError:
        """Return the error for a method that needs the agent in a guest without the agent."""
        message = f"{name}() needs the QEMU guest agent, which does not run in this guest."
        return UnsupportedError(message, hint=self.agent)

    def refusal(self, name: str) -> UnsupportedError:
        """Return the error for a method or an argument that this guest OS does not support."""
        feature = NEEDED[name]
        ending = "=" if name in FEATURES[feature].arguments else "" if "(" in name else "()"
        instead = self.instead.get(feature, FEATURES[feature].instead)
        return UnsupportedError(
            f"{name}{ending} is not available for {self.title} guests.", hint=instead
        )
