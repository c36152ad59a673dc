"""Disposable computers for asyncio: `async with AsyncSmolVM(...) as vm`."""

from __future__ import annotations

from smolvm_async.config.checks import PortForward
from smolvm_async.config.vm_config import Limits, Timeouts
from smolvm_async.controls.desktop.comparison import Region
from smolvm_async.controls.desktop.picture import Screenshot
from smolvm_async.controls.ssh.access import Access
from smolvm_async.controls.ssh.lines import LineStream
from smolvm_async.controls.ssh.result import CommandResult, Line
from smolvm_async.errors import (
    AcceleratorWarning,
    CommandError,
    CommandFailedError,
    CommandTimeoutError,
    ConfigError,
    ConnectionLostError,
    FileTransferError,
    FleetError,
    HostError,
    ImageError,
    JobFailedError,
    LaunchError,
    MemberFailedError,
    MonitorError,
    PictureError,
    RemoteError,
    SmolVMError,
    UnsupportedError,
    VMAlreadyExistsError,
    VMCrashedError,
    VMNotFoundError,
    VMNotRunningError,
    VMTimeoutError,
    WorkerLostError,
)
from smolvm_async.fleet import DaskFleet, Fleet, FleetStatus, MemberStatus
from smolvm_async.foundation.progress import Progress
from smolvm_async.images.cache import CachedImage, Damage, ImageStore
from smolvm_async.images.publish import push_image
from smolvm_async.qemu.events import (
    BootState,
    BootStateChanged,
    Event,
    EventStream,
    GuestPanicked,
    PortChanged,
    Reset,
    Shutdown,
)
from smolvm_async.qemu.shutdown import Rung, ShutdownReport, Step
from smolvm_async.state.record import Status
from smolvm_async.state.registry import VMInfo
from smolvm_async.vm.vm import AsyncSmolVM

__all__ = [
    "AcceleratorWarning",
    "Access",
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
    "FileTransferError",
    "Fleet",
    "FleetError",
    "FleetStatus",
    "GuestPanicked",
    "HostError",
    "ImageError",
    "ImageStore",
    "JobFailedError",
    "LaunchError",
    "Limits",
    "Line",
    "LineStream",
    "MemberFailedError",
    "MemberStatus",
    "MonitorError",
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
    "Status",
    "Step",
    "Timeouts",
    "UnsupportedError",
    "VMAlreadyExistsError",
    "VMCrashedError",
    "VMInfo",
    "VMNotFoundError",
    "VMNotRunningError",
    "VMTimeoutError",
    "WorkerLostError",
    "push_image",
]
