"""Checks of single arguments.

Each check raises a `ConfigError` that names the argument, the problem and the solution.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeGuard

from pydantic import Field

from smolvm_async.errors import ConfigError, SmolVMError
from smolvm_async.foundation.paths import PathError, absolute, expand

Port = Annotated[int, Field(ge=1, le=65535)]


class PortForward(NamedTuple):
    """A TCP port of the guest that can be reached on 127.0.0.1.

    Attributes:
        guest_port: The port in the guest.
        host_port: The port on the host; `None` lets the host's kernel choose a free port.
    """

    guest_port: Port
    host_port: Port | None = None


AccelName = Literal["auto", "kvm", "tcg"]
VNCKind = Literal["unix", "loopback"]

ENV_NAME = r"[A-Za-z_][A-Za-z0-9_]*"  # names that a POSIX shell can export
VM_ID = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
MAX_CPUS = 255  # QEMU's q35 allows more only with an interrupt remapper
MAX_MEMORY = 4 << 20  # MiB; a q35 guest's addresses end at 2**42 bytes on many processors
MAX_HEAD = 15  # a QEMU display adapter has at most 16 heads, numbered from 0
MAX_SECONDS = 1e9
MAX_LABELS, MAX_LABEL = 64, 256  # labels, and characters of a name or value
MAX_SHOWN = 200  # characters of a value in a message
MIN_RESOLUTION, MAX_RESOLUTION = (640, 480), (3840, 2160)  # VGA's own mode, and 4K


def shown(value: object) -> str:
    """Return the `repr()` of a value for a message, cut to `MAX_SHOWN` characters."""
    try:
        text = repr(value)
    except Exception:  # an int of over 4300 digits, or a faulty class of the user
        return f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def told(error: BaseException) -> str:
    """Return the first line of an error, for the message of another error."""
    try:
        line = str(error).strip().partition("\n")[0]
    except Exception:  # a faulty class of the user's
        line = ""
    if isinstance(error, SmolVMError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number; `True` and `False` do not count as numbers."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_integer(argument: str, value: object, least: int, most: int | None, advice: str) -> int:
    """Check an argument that is a whole number from `least` to `most`.

    Args:
        most: The upper bound; `None` means no upper bound.
        advice: A description of the allowed values, for the end of the message, after "pass".
    """
    if is_integer(value) and least <= value and (most is None or value <= most):
        return value
    raise ConfigError(f"{argument}={shown(value)} is wrong: pass {advice}.")


def check_boolean(argument: str, value: object) -> bool:
    """Check an argument that is `True` or `False`."""
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{argument}={shown(value)} is wrong: pass True or False.")


def check_timeout(timeout: object) -> None:
    """Check the `timeout=` of a method; `None` means the method's default."""
    if timeout is not None:
        check_seconds("timeout", timeout)


def check_seconds(argument: str, seconds: object) -> None:
    """Check an argument that is a duration in seconds, 0 or more."""
    if (
        not isinstance(seconds, int | float)
        or isinstance(seconds, bool)
        or not 0 <= seconds <= MAX_SECONDS
    ):
        limits = f"seconds, 0 or more, at most {MAX_SECONDS:.0f}"
        raise ConfigError(f"{argument}={shown(seconds)} is wrong: pass {limits}.")


def check_life(argument: str, seconds: object) -> float | None:
    """Check `ttl=` or `idle_timeout=`, and return the seconds; `None` means no limit."""
    if seconds is None:
        return None
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0:
        check_seconds(argument, seconds)
        return float(seconds)
    limits = f"seconds, more than 0, at most {MAX_SECONDS:.0f}"
    raise ConfigError(f"{argument}={shown(seconds)} is wrong: pass {limits}.")


def check_vm_id(vm_id: object) -> str:
    """Check the id of a VM against the pattern `VM_ID`, and return the id."""
    return _check_id("vm_id", vm_id, "an id", "build-42")


def check_snapshot_name(name: object, argument: str = "name") -> str:
    """Check the name of a snapshot, which is a name of a directory, and return the name."""
    return _check_id(argument, name, "a name", "tools-installed")


def _check_id(argument: str, value: object, noun: str, example: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(VM_ID, value):
        raise ConfigError(
            f"{argument}={shown(value)} is wrong: pass {noun} of 1 to 63 lower-case letters, "
            "digits and hyphens that does not begin or end with a hyphen, such as "
            f"{argument}={example!r}."
        )
    return value


def check_labels(labels: object) -> dict[str, str]:
    """Check the labels of a VM or a snapshot, which are texts by name; return a copy."""
    if labels is None:
        return {}
    if not isinstance(labels, Mapping) or len(labels) > MAX_LABELS:
        raise ConfigError(
            f"labels={shown(labels)} is wrong: pass a mapping with at most {MAX_LABELS} labels, "
            "such as labels={'project': 'x'}."
        )
    if "" in labels:
        raise ConfigError("labels= has an empty name: give each label a name.")
    for part in (*labels, *labels.values()):
        if not isinstance(part, str) or len(part) > MAX_LABEL or not part.isprintable():
            raise ConfigError(
                f"labels= has {shown(part)}: names and values are str of at most {MAX_LABEL} "
                "printable characters."
            )
    return dict(labels)


def check_path(path: object, argument: str, kind: str) -> Path:
    """Check an argument that is a path; return it as an absolute path with `~` expanded.

    Args:
        kind: The kind of file at the path, for the message: "a directory".
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
    """Check the kind of VNC server: a `unix` socket, a `loopback` port, or no server (`None`)."""
    if kind is None or kind is False:
        return None
    if kind is True or kind == "loopback":
        return "loopback"
    if kind == "unix":
        return "unix"
    raise ConfigError(
        f"{argument}={shown(kind)} is wrong: pass 'loopback' (a port on 127.0.0.1; True means "
        "the same), 'unix' (a socket in the VM's directory), or None."
    )


def check_display(display: object, head: object) -> None:
    """Check the id of a display adapter, and the number of one of its heads (outputs)."""
    if display is not None and not (
        isinstance(display, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,127}", display)
    ):
        raise ConfigError(
            f"display={shown(display)} is wrong: pass the id of a display adapter in QEMU, made "
            "of letters and digits."
        )
    check_integer("head", head, 0, MAX_HEAD, f"a number from 0 to {MAX_HEAD}")


def check_cpus(cpus: object) -> int:
    """Check the number of cores."""
    advice = f"a whole number of cores from 1 to {MAX_CPUS}"
    return check_integer("cpus", cpus, 1, MAX_CPUS, advice)


def check_accel(accel: object) -> AccelName:
    """Check the name of an accelerator, or `auto`."""
    names: tuple[AccelName, ...] = ("auto", "kvm", "tcg")
    for name in names:
        if accel == name:
            return name
    raise ConfigError(f"accel={shown(accel)} is wrong: pass 'auto', 'kvm' or 'tcg'.")


def check_resolution(resolution: object) -> tuple[int, int]:
    """Check `resolution=`, and return width and height; 1280x800, the default, suits agents."""
    if resolution is None:
        return (1280, 800)
    parts = resolution
    if isinstance(resolution, str):
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", resolution)
        parts = tuple(int(part) for part in match.groups()) if match else ()
    if isinstance(parts, tuple | list) and len(parts) == 2 and all(map(is_integer, parts)):
        (least_x, least_y), (most_x, most_y) = MIN_RESOLUTION, MAX_RESOLUTION
        # The display adapter's registers store the width in units of 8 pixels.
        if least_x <= parts[0] <= most_x and least_y <= parts[1] <= most_y and not parts[0] % 8:
            return (parts[0], parts[1])
    raise ConfigError(
        f"resolution={shown(resolution)} is wrong: pass (width, height) or 'WIDTHxHEIGHT' in "
        "pixels, from 640x480 to 3840x2160, the width a multiple of 8."
    )


def check_env(env: object, argument: str = "env") -> dict[str, str]:
    """Check environment variables, and return them by name."""
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise ConfigError(f"{argument}={shown(env)} is wrong: pass a mapping of names to values.")
    for name, value in env.items():
        if not isinstance(name, str) or not re.fullmatch(ENV_NAME, name):
            raise ConfigError(
                f"{argument}= has a variable {shown(name)}: a name consists of letters, digits and "
                "underscores, and does not begin with a digit."
            )
        if not isinstance(value, str) or "\0" in value or encoded(value) is None:
            raise ConfigError(
                f"{argument}= is wrong: the value of {name} is not a str, or contains a NUL "
                "character or a lone surrogate: pass a valid str, such as str(value)."
            )
    return dict(env)


def encoded(text: str) -> bytes | None:
    """Return text as UTF-8, or `None` if that is impossible.

    If `os.fsdecode()` turned bytes of a file name into surrogates, the result has the same bytes.
    """
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return None


def check_port(argument: str, port: object) -> int:
    """Check a TCP port."""
    return check_integer(argument, port, 1, 65535, "a TCP port from 1 to 65535")


def check_port_forwards(forwards: object) -> tuple[PortForward, ...]:
    """Check and return the ports to forward from the start; each host port may occur only once."""
    if isinstance(forwards, Mapping):
        forwards = list(forwards.items())
    if isinstance(forwards, str | bytes) or not isinstance(forwards, Iterable):
        raise ConfigError(
            f"port_forwards={shown(forwards)} is wrong: pass a list of guest ports, or of "
            "(guest_port, host_port), such as port_forwards=[8000, (80, 8080)]."
        )
    checked = []
    for forward in forwards:
        pair = forward if isinstance(forward, tuple | list) else (forward, None)
        if len(pair) != 2:
            raise ConfigError(
                f"port_forwards= has {shown(forward)}: pass a guest port, or "
                "(guest_port, host_port)."
            )
        guest_port = check_port("port_forwards: guest_port", pair[0])
        host_port = None if pair[1] is None else check_port("port_forwards: host_port", pair[1])
        checked.append(PortForward(guest_port, host_port))
    taken = [forward.host_port for forward in checked if forward.host_port is not None]
    for host_port in taken:
        if taken.count(host_port) > 1:
            raise ConfigError(
                f"port_forwards= uses host port {host_port} more than once: choose a different "
                "host port for each forward."
            )
    return tuple(checked)
