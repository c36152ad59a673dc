"""Disposable computers for asyncio: `async with AsyncSmolVM(...) as vm`."""

from __future__ import annotations

from smolvm_async.config import Limits, Timeouts
from smolvm_async.controls.comparison import Region
from smolvm_async.controls.picture import Screenshot
from smolvm_async.errors import (
    AcceleratorWarning,
    CommandError,
    ConfigError,
    HostError,
    ImageError,
    LaunchError,
    MonitorError,
    PictureError,
    SmolVMError,
    UnsupportedError,
    VMAlreadyExistsError,
    VMCrashedError,
    VMNotFoundError,
    VMNotRunningError,
    VMTimeoutError,
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
from smolvm_async.progress import Progress
from smolvm_async.record import Status
from smolvm_async.registry import VMInfo
from smolvm_async.shutdown import Rung, ShutdownReport, Step
from smolvm_async.vm import AsyncSmolVM

__all__ = [
    "AcceleratorWarning",
    "AsyncSmolVM",
    "BootState",
    "BootStateChanged",
    "CommandError",
    "ConfigError",
    "Event",
    "EventStream",
    "GuestPanicked",
    "HostError",
    "ImageError",
    "LaunchError",
    "Limits",
    "MonitorError",
    "PictureError",
    "PortChanged",
    "Progress",
    "Region",
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
]
