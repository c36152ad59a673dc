"""Every exception of the library.

::

    SmolVMError
    ├── ConfigError (ValueError)         an argument is wrong
    │   ├── ImageError                   the image cannot be used
    │   ├── PictureError                 this is no complete picture
    │   ├── UnsupportedError             this guest OS does not have that feature
    │   ├── VMAlreadyExistsError         the VM id is taken
    │   └── VMNotFoundError              no VM has this id
    ├── HostError (ValueError)           the host lacks something
    ├── CommandError                     a host command failed (mcopy, apt-get, ...)
    ├── LaunchError                      QEMU or a sidecar did not start
    ├── VMCrashedError                   QEMU, a sidecar or the guest died
    ├── VMNotRunningError                the VM is not running (any more)
    ├── VMTimeoutError (TimeoutError)    a deadline passed
    │   └── CommandTimeoutError          a command in the guest took too long, and was killed
    ├── CommandFailedError               a command in the guest ended with another status than 0
    ├── ConnectionLostError              the guest cannot be reached over SSH (any more)
    ├── FileTransferError                a file could not be transferred
    ├── FleetError                       something of a fleet failed
    │   ├── MemberFailedError            one of its VMs
    │   ├── JobFailedError               what map() was to do with one item
    │   ├── RemoteError                  what another machine raised and cannot be had here
    │   └── WorkerLostError              a Dask worker was lost while it did a job
    └── MonitorError                     QEMU refused a QMP command

and one warning, `AcceleratorWarning`.
"""

from __future__ import annotations

__all__ = [
    "AcceleratorWarning",
    "CommandError",
    "CommandFailedError",
    "CommandTimeoutError",
    "ConfigError",
    "ConnectionLostError",
    "FileTransferError",
    "FleetError",
    "HostError",
    "ImageError",
    "JobFailedError",
    "LaunchError",
    "MemberFailedError",
    "MonitorError",
    "PictureError",
    "RemoteError",
    "SmolVMError",
    "UnsupportedError",
    "VMAlreadyExistsError",
    "VMCrashedError",
    "VMNotFoundError",
    "VMNotRunningError",
    "VMTimeoutError",
    "WorkerLostError",
]


class SmolVMError(Exception):
    """Base of every error that this library raises."""


class ConfigError(SmolVMError, ValueError):
    """An argument is wrong; nothing was created."""


class ImageError(ConfigError):
    """The image cannot be used; QEMU never saw it."""


class PictureError(ConfigError):
    """What should be a picture is none, or only a part of one."""


class UnsupportedError(ConfigError):
    """The guest OS does not have this feature; the message names the workaround."""


class VMAlreadyExistsError(ConfigError):
    """A living VM, of this process or of another one, or a kept VM has this id."""


class VMNotFoundError(ConfigError):
    """No VM has this id."""


class HostError(SmolVMError, ValueError):
    """The host lacks a program, a file or a feature; the message says how to get it."""


class CommandError(SmolVMError):
    """A host command ended with an error; the message quotes the end of its output."""


class LaunchError(SmolVMError):
    """QEMU or a sidecar did not start: command, exit status and the end of its log."""


class VMCrashedError(SmolVMError):
    """QEMU, a sidecar or the guest itself died: which one, how, and the end of its log."""


class VMNotRunningError(SmolVMError):
    """The VM was not started, has stopped, or was deleted."""


class VMTimeoutError(SmolVMError, TimeoutError):
    """A deadline passed; the message says what was waited for and what was seen."""


class CommandTimeoutError(VMTimeoutError):
    """A command in the guest took too long, and was killed.

    Attributes:
        stdout: What it had printed by then, text or bytes as the call wanted it.
        stderr: Likewise.
    """

    def __init__(self, message: str, stdout: str | bytes = "", stderr: str | bytes = "") -> None:
        super().__init__(message)
        self.stdout = stdout
        self.stderr = stderr


class CommandFailedError(SmolVMError):
    """A command in the guest ended with another exit code than 0, and `check` was set.

    Attributes:
        result: Its `CommandResult`.
    """

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class ConnectionLostError(SmolVMError):
    """The guest cannot be reached over SSH, or not any more: it was reset, its server died."""


class FileTransferError(SmolVMError):
    """A file could not be transferred; nothing is left under its name."""


class FleetError(SmolVMError):
    """Something of a fleet failed; fleets raise an `ExceptionGroup` of these."""


class MemberFailedError(FleetError):
    """A VM of a fleet did not start, or crashed; `__cause__` says why.

    Attributes:
        vm_id: Which one.
    """

    def __init__(self, message: str, vm_id: str = "") -> None:
        super().__init__(message)
        self.vm_id = vm_id


class JobFailedError(FleetError):
    """A job of `map()` failed as often as it was tried; `__cause__` says why, the last time.

    Attributes:
        item: What it was to be done with.
        index: Which of the items that is, from 0.
        vm_id: The VM of the last try; empty if it had none.
        attempts: How often it was tried.
    """

    def __init__(
        self,
        message: str,
        item: object = None,
        index: int = 0,
        vm_id: str = "",
        attempts: int = 1,
    ) -> None:
        super().__init__(message)
        self.item = item
        self.index = index
        self.vm_id = vm_id
        self.attempts = attempts


class RemoteError(FleetError):
    """Stands for an exception of another machine that cannot be made here; says which it was."""


class WorkerLostError(FleetError):
    """A Dask worker, or the scheduler, was lost while a job was done, which may have half been."""


class MonitorError(SmolVMError):
    """QEMU refused a QMP command."""


class AcceleratorWarning(UserWarning):
    """KVM cannot be used; the guest runs under TCG, many times slower."""
