"""How a VM ended, in words and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from smolvm_async import Rung, ShutdownReport

ENDINGS = {
    Rung.POWERDOWN: "the guest powered itself down",
    Rung.GUEST: "the guest had shut itself down",
    Rung.QUIT: "QEMU was told to quit",
    Rung.SIGTERM: "QEMU was ended by SIGTERM",
    Rung.SIGKILL: "QEMU was killed",
    Rung.CRASH: "it had crashed",
    Rung.NONE: "it was not running",
}


def describe_ending(vm_id: str, report: ShutdownReport) -> str:
    """A sentence."""
    return f"{vm_id} has stopped: {ENDINGS[report.rung]} ({report.rung}, {report.seconds:.2f} s)."


def ending_fields(vm_id: str, report: ShutdownReport) -> dict[str, Any]:
    """The same and all rungs that were tried, for JSON."""
    return {"vm_id": vm_id, "graceful": report.graceful, **asdict(report)}
