"""All exceptions of the library.

::

    SmolVMError
    ├── ConfigError (ValueError)         an argument is wrong
    │   ├── ActionError                  a computer-use model's action is wrong
    │   ├── ImageError                   the image cannot be used
    │   ├── PictureError                 the data is not a complete picture
    │   ├── SnapshotExistsError          the snapshot's name is taken
    │   ├── SnapshotNotFoundError        no snapshot has this name
    │   ├── UnsupportedError             the guest OS or this version lacks the feature
    │   ├── VMAlreadyExistsError         the VM id is taken
    │   │   └── VMElsewhereError         another host uses the VM
    │   └── VMNotFoundError              no VM has this id
    ├── HostError (ValueError)           the host lacks something
    ├── CommandError                     a host command failed (mcopy, apt-get, ...)
    ├── LaunchError                      QEMU or a sidecar did not start
    ├── VMCrashedError                   QEMU, a sidecar or the guest died
    ├── VMNotRunningError                the VM is not running (any more)
    │   └── VMExpiredError               the VM's time (ttl=) is over
    ├── VMTimeoutError (TimeoutError)    a deadline passed
    │   └── CommandTimeoutError          a command in the guest took too long and was killed
    ├── CommandFailedError               a command in the guest ended with an exit code other than 0
    ├── MountError                       the guest cannot mount a host directory
    ├── ConnectionLostError              the guest cannot be reached (any more)
    │   └── LoginError                   the guest's SSH server refuses the login, or is another one
    ├── FileTransferError                a file could not be transferred
    ├── FleetError                       a part of a fleet failed
    │   ├── MemberFailedError            a VM did not start, or crashed
    │   ├── JobFailedError               a job of map() failed for an item
    │   ├── RemoteError                  an exception of another machine that cannot be loaded here
    │   └── WorkerLostError              a Dask worker was lost during a job
    ├── GuestAgentError                  the guest agent refused a command
    ├── MonitorError                     QEMU refused a QMP command
    └── SnapshotError                    the snapshot cannot be made or used

and two warnings, `AcceleratorWarning` and `NetworkWarning`.

`str(error)` is for people: it contains the message, then the hint. The attributes are for programs.
Each attribute is a dataclass field with a default, and no other list of the fields exists:
`to_json()` iterates over them, and `__reduce__()` keeps them in pickles and copies, even the fields
of a subclass with other arguments. Only `message` and the fields of older versions can be passed by
position.
"""

from __future__ import annotations

import base64
import copyreg
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as error_class

    from smolvm_async.controls.commands.result import CommandResult
    from smolvm_async.qemu.events import Trouble

else:
    # eq=False and repr=False keep Exception's comparison by identity and its repr. All errors share
    # one `__init__`: to generate one for each class takes 1 % of the library's import.
    error_class = partial(dataclass, init=False, eq=False, repr=False)


@error_class
class SmolVMError(Exception):
    """Base class of every error that this library raises.

    Attributes:
        message: The problem.
        hint: The fix; empty if the message contains the fix, or if no fix is known. If there is a
            hint, the message ends with a period.
        troubles: The troubles of the VM that may be the reason, as QEMU reported them: a full or
            broken disk, a guest that is paused, ... `str(error)` lists them at its end.
    """

    message: str = ""
    _: KW_ONLY
    hint: str = ""
    troubles: tuple[Trouble, ...] = ()

    if not TYPE_CHECKING:  # a type checker knows the constructor of each dataclass

        def __init__(self, *args: Any, **values: Any) -> None:
            by_position = [field.name for field in fields(self) if not field.kw_only]
            if len(args) > len(by_position):
                raise TypeError(f"{type(self).__name__}() takes at most {len(by_position)} values")
            for name, value in zip(by_position, args, strict=False):
                if values.setdefault(name, value) is not value:
                    raise TypeError(f"{type(self).__name__}() got two values for {name!r}")
            for field in fields(self):
                setattr(self, field.name, values.pop(field.name, field.default))
            if values:
                raise TypeError(f"{type(self).__name__}() has no field {min(values)!r}")
            super().__init__(self.message)

    def __str__(self) -> str:
        text = super().__str__()
        if self.hint:
            text += f"\n{self.hint}" if "\n" in text else f" {self.hint}"
        text = "\n".join((text, *(str(trouble) for trouble in self.troubles)))
        # A file name that is not UTF-8 has surrogates, which most files and terminals refuse.
        return text.encode(errors="backslashreplace").decode()

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception.__reduce__() calls the class with `args`, which a subclass may not accept.
        new = copyreg.__newobj__  # type: ignore[attr-defined]
        return new, (type(self),), {**vars(self), "args": self.args}

    def extend(self, text: str) -> None:
        """Add a line or several lines to the message."""
        self.message = f"{self.message}\n{text}"
        self.args = (self.message, *self.args[1:])

    def to_json(self) -> dict[str, Any]:
        """Return the name of the class as `type`, and every field, in JSON types.

        Bytes become `{"base64": ...}`; an object without a JSON type becomes its `repr()`.
        """
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"type": type(self).__name__, **values}


def _plain(value: object) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return repr(value)


class ConfigError(SmolVMError, ValueError):
    """An argument is wrong; nothing was created."""


@error_class(kw_only=True)
class ActionError(ConfigError):
    """A computer-use model's action is wrong: pass the message on to the model.

    Attributes:
        action: The action.
    """

    action: object = None


class ImageError(ConfigError):
    """The image cannot be used; QEMU was not started with it."""


class PictureError(ConfigError):
    """The data is not a complete picture."""


class SnapshotExistsError(ConfigError):
    """Another snapshot has this name."""


class SnapshotNotFoundError(ConfigError):
    """No snapshot has this name."""


class UnsupportedError(ConfigError):
    """The guest OS or this version lacks the feature; the message names a workaround."""


class VMAlreadyExistsError(ConfigError):
    """Another VM has this id: a running VM of this or another process, or a kept VM."""


@error_class
class VMElsewhereError(VMAlreadyExistsError):
    """The VM belongs to another host that shares the data directory; `hint` says what to do.

    Attributes:
        host: The name of that host.
    """

    host: str = ""


class VMNotFoundError(ConfigError):
    """No VM has this id."""


@error_class(kw_only=True)
class HostError(SmolVMError, ValueError):
    """The host lacks a program, a file, a feature or a resource; `hint` says how to get it.

    Attributes:
        missing: The names of the programs, packages, files or resources that the host lacks,
            such as `swtpm`, `ovmf`, `kvm`, `memory` or `disk space`; empty if there is no name.
    """

    missing: tuple[str, ...] = ()


@error_class(kw_only=True)
class CommandError(SmolVMError):
    """A host command failed, or could not be started; the message quotes the end of its output.

    Attributes:
        command: The program and its arguments.
        returncode: The exit status, negative for a signal; `None` if the program did not start, or
            if the exit status is unknown.
        output: The whole output to stdout and stderr.
    """

    command: tuple[str, ...] = ()
    returncode: int | None = None
    output: str = ""


@error_class(kw_only=True)
class LaunchError(SmolVMError):
    """QEMU or a sidecar did not start, or its directory could not be prepared.

    Attributes:
        command: The program that failed and its arguments; empty if no program was started.
        returncode: Its exit status, negative for a signal; `None` if unknown, not started
            or still running.
        log: The end of the program's output (at most 4 KiB).
    """

    command: tuple[str, ...] = ()
    returncode: int | None = None
    log: str = ""


@error_class(kw_only=True)
class VMCrashedError(SmolVMError):
    """QEMU, a sidecar or the guest died.

    Attributes:
        process: The part that died: `QEMU`, the name of a sidecar such as `swtpm`, `guest` (the
            guest panicked, or the accelerator could not run it any further), or `owner` (the
            process that had started the VM).
        returncode: The exit status of that process, negative for a signal; `None` if there is none,
            or if it is unknown.
        log: The end of QEMU's or the sidecar's output (at most 4 KiB).
        console: The end of the guest's serial console (at most 4 KiB).
    """

    process: str = ""
    returncode: int | None = None
    log: str = ""
    console: str = ""


class VMNotRunningError(SmolVMError):
    """The VM was not started, has stopped, or was deleted."""


class VMExpiredError(VMNotRunningError):
    """The VM was deleted because its time, the argument `ttl=`, is over."""


@error_class(kw_only=True)
class VMTimeoutError(SmolVMError, TimeoutError):
    """A deadline passed; the message names the event that did not happen.

    Attributes:
        seconds: The duration of the wait.
        state: The VM's boot state at the deadline (see `BootState`); empty if the wait was for
            something other than a boot state.
        console: The end of the guest's serial console (at most 4 KiB); empty likewise.
        log: The end of QEMU's output (at most 4 KiB).
    """

    seconds: float = 0.0
    state: str = ""
    console: str = ""
    log: str = ""


@error_class
class CommandTimeoutError(VMTimeoutError):
    """A command in the guest took too long and was killed.

    Attributes:
        stdout: The standard output until then: text or bytes, depending on the call's arguments.
        stderr: The standard error until then, likewise.
    """

    stdout: str | bytes = ""
    stderr: str | bytes = ""


@error_class
class CommandFailedError(SmolVMError):
    """A command in the guest ended with an exit code other than 0, and `check` was set.

    Attributes:
        result: The command's `CommandResult`.
    """

    result: CommandResult[Any] = None  # type: ignore[assignment]  # run() always passes it


class ConnectionLostError(SmolVMError):
    """The guest cannot be reached (any more): it was reset, or its SSH server or agent died."""


class LoginError(ConnectionLostError):
    """The SSH server of the image refuses the login, or shows another host key than before."""


class FileTransferError(SmolVMError):
    """A file could not be transferred; no partial file is left under its name."""


class MountError(SmolVMError):
    """The guest cannot mount or unmount a host directory; `hint` says what it lacks."""


class FleetError(SmolVMError):
    """A part of a fleet failed; fleets raise an `ExceptionGroup` of these errors."""


@error_class
class MemberFailedError(FleetError):
    """A VM of a fleet did not start, or crashed; `__cause__` is the reason.

    Attributes:
        vm_id: The VM's id.
    """

    vm_id: str = ""


@error_class
class JobFailedError(FleetError):
    """A job of `map()` failed at every attempt; `__cause__` is the error of the last attempt.

    Attributes:
        item: The item that was passed to the job.
        index: The item's position, from 0.
        vm_id: The id of the last attempt's VM; empty if that attempt had no VM.
        attempts: The number of attempts.
    """

    item: object = None
    index: int = 0
    vm_id: str = ""
    attempts: int = 1


class RemoteError(FleetError):
    """Another machine raised an exception that cannot be loaded here; the message describes it."""


class WorkerLostError(FleetError):
    """The Dask worker or scheduler was lost during a job; the job may have run partly."""


@error_class(kw_only=True)
class GuestAgentError(SmolVMError):
    """The guest agent refused a command, or its reply makes no sense.

    Attributes:
        command: The agent's command, such as `guest-exec`.
        error_class: The agent's error class, such as `GenericError` or `CommandNotFound`; empty
            if it did not answer with an error.
    """

    command: str = ""
    error_class: str = ""


@error_class(kw_only=True)
class MonitorError(SmolVMError):
    """QEMU refused a QMP command, or did not answer it.

    Attributes:
        command: The QMP command, such as `screendump`.
        error_class: The QMP error class, such as `GenericError` or `CommandNotFound`; empty
            if QEMU did not answer.
    """

    command: str = ""
    error_class: str = ""


class SnapshotError(SmolVMError):
    """The snapshot cannot be made, or cannot be used here; the message says why."""


class AcceleratorWarning(UserWarning):
    """KVM cannot be used; the guest runs under TCG, many times slower."""


class NetworkWarning(UserWarning):
    """This host cannot enforce a network policy; the guest can reach the host's loopback."""
