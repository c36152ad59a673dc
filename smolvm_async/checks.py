"""Checks of single arguments: each names the argument, what is wrong and what to do instead."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from smolvm_async.errors import ConfigError
from smolvm_async.paths import PathError, absolute, expand

VNCKind = Literal["unix", "loopback"]

VM_ID = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
MAX_CPUS = 255  # what QEMU's q35 takes without an interrupt remapper
MAX_HEAD = 15  # QEMU's adapters have at most 16
MAX_SECONDS = 1e9
MAX_SHOWN = 200  # characters
MIN_RESOLUTION, MAX_RESOLUTION = (640, 480), (3840, 2160)  # VGA's own mode, and 4K


def shown(value: object) -> str:
    """How a message shows a value, which may be as long as its maker pleased."""
    try:
        text = repr(value)
    except ValueError:  # an int of over 4300 digits
        return "..."
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def check_timeout(timeout: object) -> None:
    """Check the `timeout=` of a method; `None` stands for its default.

    Raises:
        ConfigError: If it is not a number of seconds, 0 or more.
    """
    if timeout is not None:
        check_seconds("timeout", timeout)


def check_seconds(argument: str, seconds: object) -> None:
    """Check an argument that is a time.

    Raises:
        ConfigError: If it is not a number of seconds, 0 or more.
    """
    if (
        not isinstance(seconds, int | float)
        or isinstance(seconds, bool)
        or not 0 <= seconds <= MAX_SECONDS
    ):
        raise ConfigError(f"{argument}={shown(seconds)} is wrong: pass seconds, 0 or more.")


def check_vm_id(vm_id: object) -> str:
    """Check the id of a VM.

    Raises:
        ConfigError: If no VM can have it.
    """
    if not isinstance(vm_id, str) or not re.fullmatch(VM_ID, vm_id):
        raise ConfigError(
            f"vm_id={vm_id!r} is wrong: pass 1 to 63 lower-case letters, digits and hyphens, "
            "with no hyphen at either end, such as vm_id='build-42'."
        )
    return vm_id


def check_path(path: object, argument: str, kind: str) -> Path:
    """The absolute path that an argument means, `~` expanded.

    Args:
        kind: What the path should be of: "a directory".

    Raises:
        ConfigError: If no path can be that.
    """
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    reason = "is wrong"
    if isinstance(path, str) and path:
        try:
            return absolute(expand(path))
        except PathError as error:
            reason = str(error)
    raise ConfigError(f"{argument}={shown(path)} {reason}: pass the path of {kind} as str or Path.")


def check_vnc_kind(kind: object, argument: str = "vnc") -> VNCKind | None:
    """Check how VNC is to be reached: a unix socket, a port of the loopback, or not at all.

    Raises:
        ConfigError: If it is none of these.
    """
    if kind is None or kind is False:
        return None
    if kind is True or kind == "loopback":
        return "loopback"
    if kind == "unix":
        return "unix"
    raise ConfigError(
        f"{argument}={shown(kind)} is wrong: pass 'loopback' (a port of 127.0.0.1; True is the "
        "same), 'unix' (a socket in the VM's directory), or None."
    )


def check_display(display: object, head: object) -> None:
    """Check the name of a display adapter, and which of its outputs is meant.

    Raises:
        ConfigError: If no adapter can have it.
    """
    if display is not None and not (
        isinstance(display, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,127}", display)
    ):
        raise ConfigError(
            f"display={shown(display)} is wrong: pass the id that a display adapter has for QEMU, "
            "letters and digits."
        )
    if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head <= MAX_HEAD:
        raise ConfigError(f"head={shown(head)} is wrong: pass a number from 0 to {MAX_HEAD}.")


def check_cpus(cpus: object) -> object:
    """The number of cores.

    Raises:
        ConfigError: If it is wrong.
    """
    if isinstance(cpus, bool) or not isinstance(cpus, int) or not 1 <= cpus <= MAX_CPUS:
        raise ConfigError(
            f"cpus={shown(cpus)} is wrong: pass a whole number of cores from 1 to {MAX_CPUS}."
        )
    return cpus


def check_accel(accel: object) -> object:
    """The name of an accelerator, or `auto`.

    Raises:
        ConfigError: If it is wrong.
    """
    if accel not in ("auto", "kvm", "tcg"):
        raise ConfigError(f"accel={shown(accel)} is wrong: pass 'auto', 'kvm' or 'tcg'.")
    return accel


def check_keep(keep: object) -> object:
    """Whether the VM is kept.

    Raises:
        ConfigError: If it is wrong.
    """
    if not isinstance(keep, bool):
        raise ConfigError(f"keep={shown(keep)} is wrong: pass True or False.")
    return keep


def check_resolution(resolution: object) -> tuple[int, int]:
    """The screen's width and height in pixels; 1280x800, which suits agents, if `None`.

    Raises:
        ConfigError: If it is wrong.
    """
    if resolution is None:
        return (1280, 800)
    parts = resolution
    if isinstance(resolution, str):
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", resolution)
        parts = tuple(int(part) for part in match.groups()) if match else ()
    if (
        isinstance(parts, tuple | list)
        and len(parts) == 2
        and all(isinstance(part, int) and not isinstance(part, bool) for part in parts)
    ):
        (least_x, least_y), (most_x, most_y) = MIN_RESOLUTION, MAX_RESOLUTION
        # The adapter's registers take the width in steps of 8 pixels.
        if least_x <= parts[0] <= most_x and least_y <= parts[1] <= most_y and not parts[0] % 8:
            return (parts[0], parts[1])
    raise ConfigError(
        f"resolution={shown(resolution)} is wrong: pass (width, height) or 'WIDTHxHEIGHT' in "
        "pixels, from 640x480 to 3840x2160, the width a multiple of 8."
    )
