"""Arguments → one frozen, validated model; nothing here looks at the host or at a file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smolvm_async.config.checks import (
    PortForward,
    VNCKind,
    check_accel,
    check_cpus,
    check_env,
    check_keep,
    check_path,
    check_port_forwards,
    check_resolution,
    check_vm_id,
    check_vnc_kind,
    shown,
)
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.guests import BUILT_IN, GUESTS, PUBLISHED, GuestProfile

DAY = 86_400  # seconds
S3 = "s3://"  # what the URI of a published image begins with
MAX_MEMORY = 4 << 20  # MiB; a q35 guest's addresses end at 2**42 bytes on many processors

Deadline = Annotated[float, Field(gt=0, le=DAY, allow_inf_nan=False)]
DeadlineOrZero = Annotated[float, Field(ge=0, le=DAY, allow_inf_nan=False)]


class _Model(BaseModel):
    """Frozen and strict; what pydantic complains of first becomes a `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    argument: ClassVar[str] = ""  # the constructor's, where the names are not its own
    example: ClassVar[str] = ""

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"{self.argument}{name}={shown(first['input'])} is wrong: {first['msg']}."
            ) from None


M = TypeVar("M", bound=_Model)


class Timeouts(_Model):
    """Deadlines in seconds.

    Attributes:
        launch: From spawning QEMU until its first QMP answer.
        boot: `wait_for()`'s own default.
        input: How long to wait for a guest that does not take what its keyboard or tablet sends.
        powerdown: How long the guest may take to power down after the power button;
            0 leaves the button out.
        quit: QMP's `quit`.
        terminate: SIGTERM; SIGKILL follows.
    """

    argument = "timeouts: "
    example = "powerdown=10"

    launch: Deadline = 30
    boot: Deadline = 300
    input: Deadline = 30
    powerdown: DeadlineOrZero = 60
    quit: DeadlineOrZero = 5
    terminate: DeadlineOrZero = 5


class Limits(_Model):
    """What VMs may take of the host; `None` sets no bound.

    Attributes:
        max_memory: MiB that all running VMs of the data directory may have together.
        vm_memory: MiB that this VM's QEMU may use (`MemoryMax` of a systemd scope). QEMU itself
            takes some 100 MiB besides the guest's memory; over the bound, the kernel kills it.
        vm_cpus: How many of the host's processors it may use (`CPUQuota` of that scope).
    """

    argument = "limits: "
    example = "max_memory=16384"

    max_memory: Annotated[int, Field(gt=0)] | None = None
    vm_memory: Annotated[int, Field(gt=0)] | None = None
    vm_cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class VMConfig(_Model):
    """What was asked for, validated. Memory is in MiB; no image means the built-in one.

    Of a published image, `os` is empty, and `memory` and `cpus` may be 0, until its manifest has
    told them: see `complete()`.
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
    env: dict[str, str] = {}
    port_forwards: Annotated[tuple[PortForward, ...], Field(strict=False)] = ()
    accel: Literal["auto", "kvm", "tcg"]
    keep: bool
    resolution: Annotated[tuple[int, int], Field(strict=False)] = (1280, 800)  # JSON has lists
    vnc: VNCKind | None = None
    limits: Limits
    timeouts: Timeouts
    data_dir: Path

    @property
    def profile(self) -> GuestProfile:
        """What the library knows of the guest OS."""
        return profile_of(self.os, self.image)


def new_vm_id() -> str:
    """`vm-` and 8 random hex digits."""
    return f"vm-{os.urandom(4).hex()}"


def default_data_dir() -> Path:
    """`$XDG_STATE_HOME/smolvm-async`, by default `~/.local/state/smolvm-async`."""
    return xdg_home("XDG_STATE_HOME", ".local/state") / "smolvm-async"


def profile_of(os: str, image: str) -> GuestProfile:
    """What the library knows of a guest OS, or of the image that it builds of one itself."""
    if not os:
        return PUBLISHED
    return GUESTS[os] if image else BUILT_IN.get(os, GUESTS[os])


def is_published(image: str) -> bool:
    """Whether `image=` is the URI of a published image."""
    return image[: len(S3)].lower() == S3


def make_config(
    *,
    os: object = None,
    image: object = None,
    kernel: object = None,
    initrd: object = None,
    boot_args: object = None,
    user: object = None,
    env: object = None,
    port_forwards: object = (),
    memory: object = None,
    cpus: object = None,
    vm_id: object = None,
    accel: object = "auto",
    keep: object = False,
    resolution: object = None,
    vnc: object = None,
    limits: object = None,
    timeouts: object = None,
    data_dir: object = None,
    features: Mapping[str, object] = MappingProxyType({}),
) -> VMConfig:
    """Validate the constructor's arguments.

    Args:
        features: Arguments that not every guest OS has, by name, with what was passed.

    Raises:
        ConfigError: It names the argument, what is wrong and what to do instead.
    """
    image = _image(image)
    profile = _profile(os, image)
    given = {"kernel": kernel, "initrd": initrd, "boot_args": boot_args, "user": user, "env": env}
    for feature, value in {**features, **given}.items():
        if value:
            profile.require(feature)
    if not image and profile.name not in BUILT_IN:
        raise ConfigError(
            f"image= is missing: this library builds no {profile.title} image; "
            f"pass image= with the path of a qcow2 that has {profile.title} installed."
        )
    arguments: dict[str, Any] = {  # pydantic checks the types
        "os": profile.name,
        "image": image,
        "memory": _memory(memory, profile),
        "cpus": profile.default_cpus if cpus is None else check_cpus(cpus),
        "vm_id": new_vm_id() if vm_id is None else check_vm_id(vm_id),
        **_direct_boot(image, kernel, initrd, boot_args),
        "user": _user(user, profile),
        "env": check_env(env),
        "port_forwards": check_port_forwards(port_forwards),
        "accel": check_accel(accel),
        "keep": check_keep(keep),
        "resolution": check_resolution(resolution),
        "vnc": check_vnc_kind(vnc),
        "limits": _nested(Limits, "limits", limits),
        "timeouts": _nested(Timeouts, "timeouts", timeouts),
        "data_dir": make_data_dir(data_dir),
    }
    return _within_bound(VMConfig(**arguments))


def complete(
    config: VMConfig,
    os: str,
    memory: int | None,
    cpus: int | None,
    features: Mapping[str, object],
) -> VMConfig:
    """The config of a published image's VM, now that its manifest has told the guest OS.

    Args:
        memory: MiB that the manifest advises, for a user who has not said.
        cpus: Likewise.
        features: See `make_config()`.

    Raises:
        ConfigError: If an argument does not go with this guest OS.
    """
    profile = profile_of(os, config.image)
    for feature, value in features.items():
        if value:
            profile.require(feature)
    advised = max(memory, profile.minimum_memory) if memory is not None else None
    update = {
        "os": os,
        "memory": _memory(config.memory or advised, profile),
        "cpus": config.cpus or cpus or profile.default_cpus,
    }
    return _within_bound(config.model_copy(update=update))


def _within_bound(config: VMConfig) -> VMConfig:
    bound = config.limits.vm_memory
    if bound is not None and bound <= config.memory:
        raise ConfigError(
            f"limits: vm_memory={bound} is too small for memory={config.memory}: QEMU needs the "
            "guest's memory and some 100 MiB for itself; pass more, or a smaller memory=."
        )
    return config


def _image(image: object) -> str:
    if image is None:
        return ""
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if not isinstance(image, str):
        raise ConfigError(f"image={image!r} is wrong: pass a path or a URI as str or Path.")
    if not image:
        raise ConfigError("image='' is empty: pass the path of a qcow2.")
    return image


def _profile(os: object, image: str) -> GuestProfile:
    names = " or ".join(f"os={name!r}" for name in GUESTS)
    if is_published(image):
        if os is not None:
            raise ConfigError(
                f"os={shown(os)} cannot be given with image={shown(image)}: the manifest of an "
                "s3:// image records the guest OS, so leave os= out."
            )
        return PUBLISHED
    if os is None and image:
        raise ConfigError(
            f"os= is missing: a file does not tell which operating system is inside {image!r}; "
            f"pass {names}."
        )
    if os is None:
        os = "linux"
    if not isinstance(os, str) or os not in GUESTS:
        raise ConfigError(f"os={os!r} is not a known guest OS: pass {names}.")
    return profile_of(os, image)


def _direct_boot(image: str, kernel: object, initrd: object, boot_args: object) -> dict[str, Any]:
    """Where QEMU itself loads a kernel from, and what it tells it."""
    if kernel is None:
        for name, value in (("initrd", initrd), ("boot_args", boot_args)):
            if value is not None:
                if is_published(image):
                    raise ConfigError(
                        f"{name}= cannot be given with image={shown(image)}: the manifest of an "
                        "s3:// image says how it boots, so leave it out."
                    )
                raise ConfigError(
                    f"{name}= goes with kernel=, which is missing: without a kernel of its own the "
                    "guest starts by the image's boot loader, which decides that itself."
                )
        return {}
    if is_published(image):
        raise ConfigError(
            f"kernel= cannot be given with image={shown(image)}: the manifest of an s3:// image "
            "says how it boots, so leave kernel=, initrd= and boot_args= out."
        )
    if not image:
        raise ConfigError("kernel= goes with image=, which is missing: pass the root disk's qcow2.")
    if boot_args is not None and (
        not isinstance(boot_args, str) or not boot_args.isprintable() or len(boot_args) > 2047
    ):
        raise ConfigError(
            f"boot_args={shown(boot_args)} is wrong: pass the kernel's command line as one str of "
            "at most 2047 printable characters, such as 'console=ttyS0 root=/dev/vda rw'."
        )
    return {
        "kernel": str(check_path(kernel, "kernel", "a Linux kernel")),
        "initrd": "" if initrd is None else str(check_path(initrd, "initrd", "an initramfs")),
        "boot_args": boot_args,
    }


def _user(user: object, profile: GuestProfile) -> str:
    if user is None or user == "root":
        return "root"
    if not isinstance(user, str) or not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", user):
        raise ConfigError(
            f"user={shown(user)} is wrong: pass a Linux user name, such as user='debian'."
        )
    if profile.login != "nocloud":
        raise ConfigError(
            f"user={user!r}: the image that this library builds has root alone; leave user= out, "
            "or make a user in the guest with run('useradd ...')."
        )
    return user


def _memory(memory: object, profile: GuestProfile) -> object:
    if memory is None:
        return profile.default_memory
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise ConfigError(
            f"memory={memory!r} is wrong: pass a whole number of MiB, "
            f"such as memory={profile.default_memory}."
        )
    if memory < profile.minimum_memory:
        raise ConfigError(
            f"memory={shown(memory)} is under the {profile.minimum_memory} MiB that "
            f"{profile.title} needs: pass memory={profile.minimum_memory} or more (MiB)."
        )
    if memory > MAX_MEMORY:
        raise ConfigError(
            f"memory={shown(memory)} is more than QEMU can give a guest: "
            f"pass MiB, at most memory={MAX_MEMORY}."
        )
    return memory


def _nested(model: type[M], argument: str, value: object) -> M:
    """An argument that is a model of its own, or a mapping of its names."""
    if value is None:
        return model()
    if isinstance(value, model):
        return value
    known = ", ".join(model.model_fields)
    if isinstance(value, Mapping):
        unknown = sorted(str(name) for name in value if name not in model.model_fields)
        if unknown:
            raise ConfigError(f"{argument}= has no {', '.join(unknown)}; there are: {known}.")
        return model(**value)
    raise ConfigError(
        f"{argument}={shown(value)} is wrong: pass {model.__name__}({model.example}) or a mapping "
        f"of its names: {known}."
    )


def make_data_dir(data_dir: object) -> Path:
    """The data directory as an absolute path; by default `default_data_dir()`.

    Raises:
        ConfigError: If it is not the path of a directory.
    """
    if data_dir is None:
        return default_data_dir()
    return check_path(data_dir, "data_dir", "a directory")
