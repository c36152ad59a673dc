"""Disposable computers for asyncio: `async with AsyncSmolVM(...) as vm`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from smolvm_async.config.checks import PortForward
from smolvm_async.config.internet import InternetSettings
from smolvm_async.config.vm_config import Limits, Timeouts
from smolvm_async.controls.commands.lines import LineStream
from smolvm_async.controls.commands.processes import GuestProcess, Terminal
from smolvm_async.controls.commands.result import CommandResult, Line
from smolvm_async.controls.desktop.comparison import Region
from smolvm_async.controls.desktop.picture import Screenshot
from smolvm_async.controls.ssh.login import Access
from smolvm_async.errors import (
    AcceleratorWarning,
    ActionError,
    CommandError,
    CommandFailedError,
    CommandTimeoutError,
    ConfigError,
    ConnectionLostError,
    FileTransferError,
    FleetError,
    GuestAgentError,
    HostError,
    ImageError,
    JobFailedError,
    LaunchError,
    LoginError,
    MemberFailedError,
    MonitorError,
    MountError,
    NetworkWarning,
    PictureError,
    RemoteError,
    SmolVMError,
    SnapshotError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    UnsupportedError,
    VMAlreadyExistsError,
    VMCrashedError,
    VMElsewhereError,
    VMExpiredError,
    VMNotFoundError,
    VMNotRunningError,
    VMTimeoutError,
    WorkerLostError,
)
from smolvm_async.foundation.progress import Progress
from smolvm_async.qemu.events import (
    BootState,
    BootStateChanged,
    Event,
    EventStream,
    GuestPanicked,
    NetworkDenied,
    PortChanged,
    Reset,
    Shutdown,
    Trouble,
)
from smolvm_async.qemu.shutdown import Rung, ShutdownReport, Step
from smolvm_async.state.status import Status
from smolvm_async.vm.vm import AsyncSmolVM

if TYPE_CHECKING:
    from smolvm_async.controls.file_info import FileInfo
    from smolvm_async.controls.guest_info import GuestDisk, GuestInfo
    from smolvm_async.fleet import DaskFleet, Fleet, FleetStatus, MemberStatus
    from smolvm_async.images.cache import CachedImage, Damage, ImageStore
    from smolvm_async.images.publish import push_image
    from smolvm_async.state.registry import VMInfo
    from smolvm_async.state.snapshot_record import SnapshotInfo
    from smolvm_async.vm.stats import VMStats

__all__ = [
    "AcceleratorWarning",
    "Access",
    "ActionError",
    "AsyncSmolVM",
    "BootState",
    "BootStateChanged",
    "CachedImage",
    "CommandError",
    "CommandFailedError",
    "CommandResult",
    "CommandTimeoutError",
    "ConfigError",
    "ConnectionLostError",
    "Damage",
    "DaskFleet",
    "Event",
    "EventStream",
    "FileInfo",
    "FileTransferError",
    "Fleet",
    "FleetError",
    "FleetStatus",
    "GuestAgentError",
    "GuestDisk",
    "GuestInfo",
    "GuestPanicked",
    "GuestProcess",
    "HostError",
    "ImageError",
    "ImageStore",
    "InternetSettings",
    "JobFailedError",
    "LaunchError",
    "Limits",
    "Line",
    "LineStream",
    "LoginError",
    "MemberFailedError",
    "MemberStatus",
    "MonitorError",
    "MountError",
    "NetworkDenied",
    "NetworkWarning",
    "PictureError",
    "PortChanged",
    "PortForward",
    "Progress",
    "Region",
    "RemoteError",
    "Reset",
    "Rung",
    "Screenshot",
    "Shutdown",
    "ShutdownReport",
    "SmolVMError",
    "SnapshotError",
    "SnapshotExistsError",
    "SnapshotInfo",
    "SnapshotNotFoundError",
    "Status",
    "Step",
    "Terminal",
    "Timeouts",
    "Trouble",
    "UnsupportedError",
    "VMAlreadyExistsError",
    "VMCrashedError",
    "VMElsewhereError",
    "VMExpiredError",
    "VMInfo",
    "VMNotFoundError",
    "VMNotRunningError",
    "VMStats",
    "VMTimeoutError",
    "WorkerLostError",
    "push_image",
]

# A program with one VM does not need fleets or S3, whose import takes as long as all other imports.
# So these names are imported on first use (PEP 562).
_ON_FIRST_USE = {
    "FileInfo": "smolvm_async.controls.file_info",
    "GuestDisk": "smolvm_async.controls.guest_info",
    "GuestInfo": "smolvm_async.controls.guest_info",
    "DaskFleet": "smolvm_async.fleet",
    "Fleet": "smolvm_async.fleet",
    "FleetStatus": "smolvm_async.fleet",
    "MemberStatus": "smolvm_async.fleet",
    "CachedImage": "smolvm_async.images.cache",
    "Damage": "smolvm_async.images.cache",
    "ImageStore": "smolvm_async.images.cache",
    "push_image": "smolvm_async.images.publish",
    "SnapshotInfo": "smolvm_async.state.snapshot_record",
    "VMInfo": "smolvm_async.state.registry",
    "VMStats": "smolvm_async.vm.stats",
}


if not TYPE_CHECKING:  # otherwise, a type checker would accept every name in this module

    def __getattr__(name: str) -> object:
        """Import a name on its first use.

        Raises:
            AttributeError: If the library has no such name.
        """
        if name not in _ON_FIRST_USE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(import_module(_ON_FIRST_USE[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the public names, for tab completion."""
    return __all__
