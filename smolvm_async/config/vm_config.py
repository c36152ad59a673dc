"""The validated configuration of a VM: immutable, and stored in the VM's record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from smolvm_async.config.checks import MAX_SECONDS, AccelName, PortForward, VNCKind
from smolvm_async.config.internet import InternetSettings
from smolvm_async.config.source import BuiltInImage, Origin, make_origin
from smolvm_async.config.strict import StrictModel
from smolvm_async.guests import BUILT_IN, GUESTS, PUBLISHED, Channel, GuestProfile

DAY = 86_400  # seconds

Deadline = Annotated[float, Field(gt=0, le=DAY, allow_inf_nan=False)]
Life = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
DeadlineOrZero = Annotated[float, Field(ge=0, le=DAY, allow_inf_nan=False)]


class Timeouts(StrictModel):
    """Deadlines in seconds.

    Attributes:
        launch: From spawning QEMU until its first QMP answer.
        boot: The default timeout of `wait_for()`; it does not count the time of a pause.
        input: For the guest to read the events of its keyboard or tablet.
        powerdown: For the guest to power down after the power button; 0 skips the button.
        quit: For QEMU to end after QMP's `quit`.
        terminate: For QEMU to end after SIGTERM; SIGKILL follows.
    """

    argument = "timeouts: "
    example = "powerdown=10"

    launch: Deadline = 30
    boot: Deadline = 300
    input: Deadline = 30
    powerdown: DeadlineOrZero = 60
    quit: DeadlineOrZero = 5
    terminate: DeadlineOrZero = 5


class Limits(StrictModel):
    """Limits on the host's resources that VMs may use; `None` means no limit.

    Attributes:
        max_memory: MiB that all running VMs of the data directory may have together.
        vm_memory: MiB that this VM's QEMU may use (`MemoryMax` of a systemd scope). QEMU itself
            needs some 100 MiB besides the guest's memory; above the limit, the kernel kills QEMU.
        vm_cpus: The number of host processors that QEMU may use (`CPUQuota` of the same scope).
    """

    argument = "limits: "
    example = "max_memory=16384"

    max_memory: Annotated[int, Field(gt=0)] | None = None
    vm_memory: Annotated[int, Field(gt=0)] | None = None
    vm_cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class VMConfig(StrictModel):
    """The validated arguments of a VM, as its record stores them. Memory is in MiB.

    For a published image, `os` is empty, and `memory` and `cpus` may be 0, until its manifest has
    been read: see `complete()`.

    Attributes:
        image: Empty for the built-in image, an absolute path, or the URI of a manifest. Use
            `origin` instead: it has a type for each of the three.
        mounts: Complete entries, `SRC:DST:ro` or `SRC:DST:rw`: see `config/mounts.py`.
        channel: The way to run commands; `None` for the guest OS's first one.
        password: The password of `user` in the image. The record does not store it.
        key: The path of the user's private key; empty if there is none.
        boot: `warm` if the first start may restore a snapshot of a guest that is ready.
        ttl: Seconds from the first start to the VM's deletion.
        idle_timeout: Seconds without a call after which the VM is paused.
    """

    os: str
    image: str
    memory: int
    cpus: int
    vm_id: str
    kernel: str = ""
    initrd: str = ""
    boot_args: str | None = None
    user: str = "root"
    channel: Channel | None = None
    password: str | None = Field(default=None, exclude=True, repr=False)
    key: str = ""
    env: dict[str, str] = Field(default={})
    port_forwards: Annotated[tuple[PortForward, ...], Field(strict=False)] = ()
    accel: AccelName
    keep: bool
    resolution: Annotated[tuple[int, int], Field(strict=False)] = (1280, 800)  # JSON has no tuples
    vnc: VNCKind | None = None
    limits: Limits
    mounts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    internet_settings: InternetSettings = InternetSettings()
    timeouts: Timeouts
    data_dir: Path
    boot: Literal["warm", "cold"] = "cold"
    labels: dict[str, str] = Field(default={})
    ttl: Life | None = None
    idle_timeout: Life | None = None

    @property
    def origin(self) -> Origin:
        """The origin of the VM's disk, as one of the three types of `Origin`."""
        return make_origin(self.image, self.kernel, self.initrd, self.boot_args)

    @property
    def profile(self) -> GuestProfile:
        """The profile of the guest OS, or of its built-in image."""
        return find_profile(self.os, self.origin).over(self.channel)


def find_profile(os: str, origin: Origin) -> GuestProfile:
    """Return the profile of a guest OS that starts from `origin`.

    Args:
        os: A name in `GUESTS`; empty for a published image whose manifest has not been read.
    """
    if not os:
        return PUBLISHED
    if isinstance(origin, BuiltInImage):
        return BUILT_IN.get(os, GUESTS[os])
    return GUESTS[os]
