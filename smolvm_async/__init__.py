"""Disposable computers for asyncio: `async with AsyncSmolVM(...) as vm`."""

from __future__ import annotations

from smolvm_async.checks import PortForward
from smolvm_async.config import Limits, Timeouts
from smolvm_async.controls.comparison import Region
from smolvm_async.controls.picture import Screenshot
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
from smolvm_async.events import (
    BootState,
    BootStateChanged,
    Event,
    EventStream,
    GuestPanicked,
    PortChanged,
    Reset,
    Shutdown,
)
from smolvm_async.fleet import DaskFleet, Fleet, FleetStatus, MemberStatus
from smolvm_async.progress import Progress
from smolvm_async.publishing import push_image
from smolvm_async.record import Status
from smolvm_async.registry import VMInfo
from smolvm_async.shutdown import Rung, ShutdownReport, Step
from smolvm_async.ssh.access import Access
from smolvm_async.ssh.lines import LineStream
from smolvm_async.ssh.result import CommandResult, Line
from smolvm_async.store import CachedImage, Damage, ImageStore
from smolvm_async.vm import AsyncSmolVM

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
