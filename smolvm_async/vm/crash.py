"""Decide whether a run has crashed.

The end of one process ends the run of all processes. No single sign is enough for this decision.
The run crashed if

- the guest panicked, or the accelerator cannot run the guest any further;
- a sidecar failed, or ended before QEMU;
- QEMU ended with an error, or without the event SHUTDOWN, or because of a signal from outside.

The run did not crash if the guest powered itself down, or if a rung of the ladder ended QEMU.
"""

from __future__ import annotations

import signal
from typing import NamedTuple

from smolvm_async.controls.interface import console_tail
from smolvm_async.errors import VMCrashedError
from smolvm_async.foundation.process import Child
from smolvm_async.foundation.tail import Tail
from smolvm_async.host.restrictions import find_cause  # an import needs a free descriptor
from smolvm_async.qemu.events import Shutdown
from smolvm_async.qemu.launch import Processes
from smolvm_async.qemu.shutdown import Rung
from smolvm_async.vm.limits import oom_reason


class Crash(NamedTuple):
    """A crash of a run.

    Attributes:
        child: The process whose log explains the crash.
        process: The part that died, if another part than `child` died.
    """

    reason: str
    child: Child
    process: str = ""
    hint: str = ""

    def to_error(self, vm_id: str, console: Tail) -> VMCrashedError:
        """Return the error to raise, with the log of the process and the end of the console."""
        reason, hint = self.reason, self.hint
        if not hint and (cause := find_cause(self.child.report())) is not None:
            reason, hint = f"{cause.reason}. {reason}", cause.cure
        return VMCrashedError(
            f"{vm_id} crashed: {reason}\n{console_tail(console)}",
            hint=hint,
            process=self.process or self.child.name,
            returncode=None if self.process else self.child.returncode,
            log=self.child.log.quote(),
            console=console.quote(),
        )


def find_crash(
    processes: Processes, guest: str | None, shutdown: Shutdown | None, rung: Rung, oom_kills: int
) -> Crash | None:
    """Return the crash of a run that has ended; `None` if the run did not crash.

    Call this before this library kills any process: our signal would look like a crash.

    Args:
        guest: The reason, if the guest crashed.
        shutdown: The last SHUTDOWN event.
        rung: The rung that ended the run.
        oom_kills: The number of the host's kills for lack of memory when the run began.
    """
    qemu = processes.qemu
    if guest:
        return Crash(guest, qemu, process="guest")
    for sidecar in processes.children[1:]:
        if sidecar.returncode or (sidecar.ended and not qemu.ended):
            return Crash(sidecar.report(), sidecar)
    if rung not in (Rung.GUEST, Rung.POWERDOWN):
        return None
    if not qemu.returncode and shutdown is not None:
        if shutdown.guest or shutdown.reason.startswith("host-qmp"):
            return None
        reason = f"QEMU was ended from outside ({shutdown.reason}). "
        return Crash(reason + qemu.report(), qemu)
    oom = oom_reason(oom_kills) if qemu.returncode in (-signal.SIGKILL, None) else ""
    hint = "Use a smaller memory=, or fewer VMs at once." if oom else ""
    return Crash(oom + qemu.report(), qemu, hint=hint)
