"""The arguments of `AsyncSmolVM`: their types and defaults, and their conversion to a `VMConfig`.

`VMOptions` is the only list of the arguments. The signature that `help()` shows, the templates of
fleets and the command line are derived from it. Nothing here reads a file or inspects the host.
"""

from __future__ import annotations

import inspect
import os as os_module
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack

from smolvm_async.config.checks import (
    MAX_MEMORY,
    check_accel,
    check_boolean,
    check_cpus,
    check_env,
    check_labels,
    check_life,
    check_path,
    check_port_forwards,
    check_resolution,
    check_vm_id,
    check_vnc_kind,
    is_integer,
    shown,
)
from smolvm_async.config.internet import InternetSettings
from smolvm_async.config.source import BuiltInImage, LocalDisk, Origin, PublishedImage, make_origin
from smolvm_async.config.strict import StrictModel
from smolvm_async.config.uri import is_published, local_path, parse_uri
from smolvm_async.config.vm_config import Limits, Timeouts, VMConfig, find_profile
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.guests import (
    ARGUMENTS,
    BUILT_IN,
    CHOICES,
    DEFAULT,
    GUESTS,
    Channel,
    GuestName,
    GuestProfile,
)


class VMOptions(TypedDict, total=False):
    """The keyword arguments of `AsyncSmolVM`, whose documentation explains each of them."""

    os: GuestName | None  # the guest OS
    image: str | os_module.PathLike[str] | None  # a path, a file:// or an s3:// URI
    kernel: str | os_module.PathLike[str] | None  # the kernel that QEMU loads
    initrd: str | os_module.PathLike[str] | None  # the kernel's initramfs
    boot_args: str | None  # the kernel's command line
    user: str | None  # the user name for SSH
    password: str | None  # the user's password in a Windows image
    key: str | os_module.PathLike[str] | None  # the file of the user's private key
    channel: Literal["ssh", "agent"] | None  # the way to run commands
    memory: int | None  # MiB
    cpus: int | None  # cores
    vm_id: str | None
    accel: Literal["auto", "kvm", "tcg"]
    env: Mapping[str, str] | None  # environment variables of all commands
    port_forwards: Iterable[int | tuple[int, int | None]] | Mapping[int, int | None]
    keep: bool  # keep the VM after the block and the process end
    boot: Literal["warm", "cold"] | None
    resolution: tuple[int, int] | str | None  # pixels
    vnc: Literal["loopback", "unix"] | bool | None
    limits: Limits | Mapping[str, float] | None
    mounts: Sequence[str | os_module.PathLike[str]]  # SRC[:DST][:rw|:ro]
    writable_mounts: bool
    internet_settings: InternetSettings | Mapping[str, object] | None
    timeouts: Timeouts | Mapping[str, float] | None
    labels: Mapping[str, str] | None
    ttl: float | None  # seconds
    idle_timeout: float | None  # seconds
    data_dir: str | os_module.PathLike[str] | None
    on_progress: ProgressCallback | None


# All other arguments are None by default.
DEFAULTS: VMOptions = {
    "accel": "auto",
    "port_forwards": (),
    "keep": False,
    "mounts": (),
    "writable_mounts": False,
}

F = TypeVar("F", bound=Callable[..., None])
M = TypeVar("M", bound=StrictModel)


def with_signature(init: F) -> F:
    """Give `__init__(self, **options)` a signature that shows each argument and its default."""
    names = ", ".join(repr(name) for name in GUESTS)
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for name, hint in VMOptions.__annotations__.items():
        annotation = hint.__forward_arg__.replace("GuestName", f"Literal[{names}]")
        kind, default = inspect.Parameter.KEYWORD_ONLY, DEFAULTS.get(name)
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
    init.__dict__["__signature__"] = inspect.Signature(parameters, return_annotation="None")
    return init


def make_config(**options: Unpack[VMOptions]) -> VMConfig:
    """Check the arguments of `AsyncSmolVM`, and return them as a `VMConfig`."""
    for name in options:
        if name not in VMOptions.__annotations__:
            raise TypeError(f"AsyncSmolVM.__init__() got an unexpected keyword argument {name!r}")
    given: dict[str, Any] = {**dict.fromkeys(VMOptions.__annotations__), **DEFAULTS, **options}
    image = _image(given["image"])
    origin = make_origin(image)
    channel = _channel(given["channel"])
    if channel is None and (given["password"] is not None or given["key"] is not None):
        channel = "ssh"
    profile = _profile(given["os"], given["image"], origin).over(channel)
    for name in ARGUMENTS:
        if given[name]:
            profile.require(name)
    if not image and profile.name not in BUILT_IN:
        raise ConfigError(
            f"image= is missing: this library does not build {profile.title} images; "
            f"pass image= with the path of a qcow2 that has {profile.title} installed."
        )
    cpus, vm_id, on_progress = given["cpus"], given["vm_id"], given["on_progress"]
    config = VMConfig(
        os=profile.name,
        image=image,
        memory=_memory(given["memory"], profile),
        cpus=profile.default_cpus if cpus is None else check_cpus(cpus),
        vm_id=new_vm_id() if vm_id is None else check_vm_id(vm_id),
        **_direct_boot(origin, given),
        user=_user(given["user"], profile),
        channel=channel,
        password=check_password(given["password"]),
        key="" if given["key"] is None else str(check_path(given["key"], "key", "a private key")),
        env=check_env(given["env"]),
        port_forwards=check_port_forwards(given["port_forwards"]),
        accel=check_accel(given["accel"]),
        keep=check_boolean("keep", given["keep"]),
        boot=_boot(given["boot"], origin),
        resolution=check_resolution(given["resolution"]),
        vnc=check_vnc_kind(given["vnc"]),
        limits=_nested(Limits, "limits", given["limits"]),
        mounts=_mounts(given["mounts"], given["writable_mounts"]),
        internet_settings=check_internet_settings(given["internet_settings"]),
        timeouts=_nested(Timeouts, "timeouts", given["timeouts"]),
        labels=check_labels(given["labels"]),
        ttl=check_life("ttl", given["ttl"]),
        idle_timeout=check_life("idle_timeout", given["idle_timeout"]),
        data_dir=make_data_dir(given["data_dir"]),
    )
    check_progress(on_progress)
    return _within_bound(config)


class CloneOptions(TypedDict, total=False):
    """The arguments of `AsyncSmolVM` that a clone of a snapshot can have, too."""

    vm_id: str | None
    password: str | None
    accel: Literal["auto", "kvm", "tcg"]
    env: Mapping[str, str] | None
    port_forwards: Iterable[int | tuple[int, int | None]] | Mapping[int, int | None]
    keep: bool
    vnc: Literal["loopback", "unix"] | bool | None
    limits: Limits | Mapping[str, float] | None
    mounts: Sequence[str | os_module.PathLike[str]]
    writable_mounts: bool
    internet_settings: InternetSettings | Mapping[str, object] | None
    timeouts: Timeouts | Mapping[str, float] | None
    labels: Mapping[str, str] | None
    ttl: float | None  # seconds
    idle_timeout: float | None  # seconds
    data_dir: str | os_module.PathLike[str] | None
    on_progress: ProgressCallback | None


def check_clone_options(options: Mapping[str, object], function: str) -> None:
    """Check the names of the arguments of a clone, which `function` got."""
    for name in options:
        if name in VMOptions.__annotations__ and name not in CloneOptions.__annotations__:
            raise ConfigError(f"{name}= cannot be given: the snapshot fixes it. Leave {name}= out.")
        if name not in CloneOptions.__annotations__:
            raise TypeError(f"{function} got an unexpected keyword argument {name!r}")


def make_clone_config(source: VMConfig, **options: Unpack[CloneOptions]) -> VMConfig:
    """Return the configuration of a clone of a VM that has the configuration `source`.

    A clone may reach what its source may reach, unless its own `internet_settings=` are given.
    """
    if options.get("internet_settings") is None:
        options["internet_settings"] = source.internet_settings
    own = dict.fromkeys(CloneOptions.__annotations__)
    return _make_again(source, {**own, **DEFAULTS, **options})


def complete(config: VMConfig, os: str, memory: int | None, cpus: int | None) -> VMConfig:
    """Complete the configuration of a published image's VM with values from the manifest.

    Args:
        os: The guest OS that the manifest names.
        memory: MiB that the manifest recommends, in case the user chose no memory.
        cpus: Cores that the manifest recommends, in case the user chose no cores.
    """
    profile = find_profile(os, config.origin).over(config.channel)
    needs = (
        *(("env", config.env), ("user", config.user != "root"), ("mounts", config.mounts)),
        *(("password", config.password), ("key", config.key)),
    )
    for name, given in needs:
        if given:
            profile.require(name)
    recommended = max(memory, profile.minimum_memory) if memory is not None else None
    update = {
        "os": os,
        "memory": _memory(config.memory or recommended, profile),
        "cpus": config.cpus or cpus or profile.default_cpus,
        "user": _user(config.user, profile),
    }
    return _within_bound(config.model_copy(update=update))


def recheck(config: VMConfig) -> VMConfig:
    """Check a configuration from a file that a stranger may have written, as if it were arguments.

    Raises:
        ConfigError: A value is wrong.
    """
    if config.os not in GUESTS:
        raise ConfigError(f"os={shown(config.os)} is not a known guest OS: pass {CHOICES}.")
    return _make_again(config, {})


def _make_again(config: VMConfig, options: Mapping[str, Any]) -> VMConfig:
    """Make a configuration again from its arguments, with these `options` instead of its own."""
    fields = VMConfig.model_fields
    given: Any = {name: value for name, value in config if value != fields[name].default}
    given.update(options, image=config.image or None)
    if isinstance(config.origin, PublishedImage):
        return complete(make_config(**{**given, "os": None}), config.os, None, None)
    return make_config(**given)


def check_internet_settings(settings: object) -> InternetSettings:
    """Return the argument `internet_settings=` as a model."""
    return _nested(InternetSettings, "internet_settings", settings)


def new_vm_id() -> str:
    """Return a random VM id: `vm-` and 8 hexadecimal digits."""
    return f"vm-{os_module.urandom(4).hex()}"


def make_data_dir(data_dir: object) -> Path:
    """Return the data directory as an absolute path; by default, use XDG's state home."""
    if data_dir is None:
        return xdg_home("XDG_STATE_HOME", ".local/state", "data_dir=") / "smolvm-async"
    return check_path(data_dir, "data_dir", "a directory")


def check_progress(on_progress: object) -> None:
    """Check a callback for progress; `None` means no callback."""
    if on_progress is not None and not callable(on_progress):
        raise ConfigError(f"on_progress={shown(on_progress)} is wrong: pass a function.")


def _within_bound(config: VMConfig) -> VMConfig:
    bound = config.limits.vm_memory
    if bound is not None and bound <= config.memory:
        raise ConfigError(
            f"limits: vm_memory={bound} is too small for memory={config.memory}: QEMU needs the "
            "guest's memory and about 100 MiB for itself; pass a larger vm_memory= or a smaller "
            "memory=."
        )
    return config


def _image(image: object) -> str:
    """Return `image=` as the record stores it: empty, an absolute path, or a manifest's URI."""
    if image is None:
        return ""
    if isinstance(image, os_module.PathLike):
        image = os_module.fspath(image)
    if not isinstance(image, str):
        raise ConfigError(f"image={shown(image)} is wrong: pass a path or a URI as str or Path.")
    if not image:
        raise ConfigError("image='' is empty: pass the path of a qcow2.")
    return parse_uri(image).uri if is_published(image) else str(local_path(image))


def _profile(os: object, image: object, origin: Origin) -> GuestProfile:
    if isinstance(origin, PublishedImage):
        if os is not None:
            raise ConfigError(
                f"os={shown(os)} cannot be given with image={shown(image)}: the manifest of an "
                "s3:// image records the guest OS, so leave os= out."
            )
        return find_profile("", origin)
    if os is None:
        if isinstance(origin, LocalDisk):
            raise ConfigError(
                f"os= is missing: smolvm_async cannot detect the operating system in {image!r}; "
                f"pass {CHOICES}."
            )
        os = DEFAULT.name
    if not isinstance(os, str) or os not in GUESTS:
        raise ConfigError(f"os={shown(os)} is not a known guest OS: pass {CHOICES}.")
    return find_profile(os, origin)


def _direct_boot(origin: Origin, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments for a kernel that QEMU itself loads, and return them by name."""
    kernel, initrd, boot_args = given["kernel"], given["initrd"], given["boot_args"]
    named = [name for name in ("kernel", "initrd", "boot_args") if given[name] is not None]
    if not named:
        return {}
    if isinstance(origin, PublishedImage):
        raise ConfigError(
            f"{named[0]}= cannot be given with image={shown(given['image'])}: the manifest of an "
            "s3:// image says how the image boots, so leave kernel=, initrd= and boot_args= out."
        )
    if kernel is None:
        raise ConfigError(
            f"{named[0]}= needs kernel=, which is missing: without kernel=, the image's boot "
            f"loader decides how the guest starts. Pass kernel= too, or leave {named[0]}= out."
        )
    if not isinstance(origin, LocalDisk):
        raise ConfigError("kernel= needs image=, which is missing: pass the root disk's qcow2.")
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


def _boot(boot: object, origin: Origin) -> Literal["warm", "cold"]:
    built_in = isinstance(origin, BuiltInImage)
    if boot is None:
        return "warm" if built_in else "cold"
    if boot == "cold":
        return "cold"
    if boot != "warm":
        raise ConfigError(f"boot={shown(boot)} is wrong: pass 'warm' or 'cold'.")
    if not built_in:
        raise ConfigError(
            "boot='warm' is only for the built-in Linux: leave boot= out. To start clones of a "
            "guest that is ready, use snapshot() and from_snapshot(), fork(), or a Fleet."
        )
    return "warm"


def _mounts(mounts: object, writable: object) -> tuple[str, ...]:
    if mounts == () and writable is False:  # most VMs
        return ()
    from smolvm_async.config.mounts import check_mounts

    return tuple(map(str, check_mounts(mounts, writable)))


def _channel(channel: object) -> Channel | None:
    if channel is None or channel == "ssh" or channel == "agent":
        return channel
    raise ConfigError(
        f"channel={shown(channel)} is wrong: pass 'ssh', or 'agent' for the QEMU guest agent."
    )


def check_password(password: object) -> str | None:
    """Check a password; no message may have it."""
    if password is None or (isinstance(password, str) and password and "\0" not in password):
        return password
    raise ConfigError("password= is wrong: pass the password of the user in the image as str.")


def _user(user: object, profile: GuestProfile) -> str:
    if profile.login == "image":
        return _account(user)
    if user is None or user == "root":
        return "root"
    if not isinstance(user, str) or not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", user):
        raise ConfigError(
            f"user={shown(user)} is wrong: pass a Linux user name, such as user='debian'."
        )
    if profile.login != "nocloud":
        raise ConfigError(
            f"user={user!r}: the built-in image has only the user root; leave user= out, "
            "or add a user in the guest with run('useradd ...')."
        )
    return user


def _account(user: object) -> str:
    """Check the name of a user in a Windows image."""
    if user is None or user == "root":  # the default of all guest OSes
        return "Administrator"
    if not isinstance(user, str) or not user.strip() or not user.isprintable() or len(user) > 256:
        raise ConfigError(f"user={shown(user)} is wrong: pass the name of a user in the image.")
    return user


def _memory(memory: object, profile: GuestProfile) -> int:
    if memory is None:
        return profile.default_memory
    if not is_integer(memory):
        raise ConfigError(
            f"memory={shown(memory)} is wrong: pass a whole number of MiB, "
            f"such as memory={profile.default_memory or DEFAULT.default_memory}."
        )
    if memory < profile.minimum_memory:
        raise ConfigError(
            f"memory={shown(memory)} is less than the {profile.minimum_memory} MiB that "
            f"{profile.title} guests need: pass memory={profile.minimum_memory} or more (MiB)."
        )
    if memory > MAX_MEMORY:
        raise ConfigError(
            f"memory={shown(memory)} is more memory than QEMU can give a guest: "
            f"pass at most memory={MAX_MEMORY} (MiB)."
        )
    return memory


def _nested(model: type[M], argument: str, value: object) -> M:
    """Return an argument as a model; the argument may be a mapping of the model's fields."""
    if value is None:
        return model()
    if isinstance(value, model):
        return value
    known = ", ".join(model.model_fields)
    if isinstance(value, Mapping):
        unknown = sorted(str(name) for name in value if name not in model.model_fields)
        if unknown:
            raise ConfigError(
                f"{argument}= has unknown fields: {', '.join(unknown)}; pass only these fields: "
                f"{known}."
            )
        return model(**value)
    raise ConfigError(
        f"{argument}={shown(value)} is wrong: pass {model.__name__}({model.example}) or a mapping "
        f"of its fields: {known}."
    )
