"""Processes that run beside QEMU, one file for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

from smolvm_async.host import HostTools
from smolvm_async.sidecars.attachment import Attachment
from smolvm_async.sidecars.swtpm import swtpm
from smolvm_async.state import StateDirectory

__all__ = ["SIDECARS", "Attachment", "Sidecar"]

Sidecar = Callable[[HostTools, StateDirectory], AbstractAsyncContextManager[Attachment]]

SIDECARS: Mapping[str, Sidecar] = {"swtpm": swtpm}
