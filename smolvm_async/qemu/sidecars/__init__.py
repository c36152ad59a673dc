"""Processes that run beside QEMU, one file for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from smolvm_async.host import HostTools
from smolvm_async.qemu.sidecars.attachment import Attachment
from smolvm_async.qemu.sidecars.swtpm import swtpm

__all__ = ["SIDECARS", "Attachment", "Sidecar"]

Sidecar = Callable[[HostTools], Attachment]

SIDECARS: Mapping[str, Sidecar] = {"swtpm": swtpm}
