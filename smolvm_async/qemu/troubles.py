"""The troubles of a VM: everything that QEMU has reported that can explain a deadline that passed.

A guest whose disk fails, or whose processors QEMU has stopped, just does not answer. QEMU knows the
reason. So `Troubles` collects QEMU's reports for one run of a VM, in the owner and in each attached
process, and `explain()` adds them to an error. Everything that raises an error of a deadline, or of
a lost connection, calls `explain()`.

The owner also publishes a `Trouble` as an event and logs a warning: the first of its kind, then
every time that the count has doubled, since a broken disk may fail a thousand times in a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import SmolVMError
from smolvm_async.foundation.process import stat_fields
from smolvm_async.host.file_systems import find_file_system
from smolvm_async.qemu.events import Event, Trouble
from smolvm_async.state.names import OVERLAY, SEED, VARS

E = TypeVar("E", bound=SmolVMError)

QUOTED_LINES = 10  # of QEMU's log, at the end of an error message

# QEMU's run states in which the guest's processors do not run; see qapi/run-state.json.
RUN_STATES: Mapping[str, str] = {
    "paused": "The guest is paused",
    "postmigrate": "The guest is paused",  # and was saved while it was paused
    "io-error": "QEMU has paused the guest, because it could not access the guest's disk",
    "internal-error": "The accelerator cannot run the guest any further",
    "guest-panicked": "QEMU has stopped the guest, because the guest's kernel panicked",
    "watchdog": "QEMU has stopped the guest, because the guest's watchdog expired",
    "suspended": "The guest has suspended itself",
    "shutdown": "The guest has shut down",
}
RESUME = "Call resume()."


class Troubles:
    """The troubles of one run of a VM.

    Attributes:
        known: The troubles until now, by kind and, for a disk, by the failing access.
        image: The image that the VM's disk is based on, once it is known.
    """

    def __init__(
        self,
        config: VMConfig,
        log: Callable[[], str] = lambda: "",
        pid: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Make the object for the VM of `config`.

        `log` returns the end of QEMU's log, and `pid` the id of QEMU's process, if it is known.
        """
        self.known: dict[str, Trouble] = {}
        self.image = Path(config.image)
        self._log = log
        self._pid = pid
        directory = config.data_dir / config.vm_id
        self._directory = directory
        self._files = {
            "vars": ("the UEFI variables", directory / VARS),
            "seed": ("cloud-init's disk", directory / SEED),
        }

    def follow(self, event: Event) -> None:
        """Note an event in an attached process: the owner publishes all troubles."""
        if isinstance(event, Trouble):
            self.known[event.key] = event
        elif event.name in ("RESUME", "WAKEUP"):
            stopped = [key for key, trouble in self.known.items() if trouble.stops]
            for key in stopped:  # QEMU tries the failed accesses again
                del self.known[key]
        elif event.name == "STOP":
            self._note(event, "paused", RUN_STATES["paused"], hint=RESUME, stops=True)

    def on_event(self, event: Event) -> Trouble | None:
        """Note an event of QEMU in the owner; return the trouble to publish, if there is one."""
        self.follow(event)
        if event.name == "BLOCK_IO_ERROR":
            return self._disk_error(event)
        if event.name == "BLOCK_IMAGE_CORRUPTED":
            return self._corruption(event)
        if event.name == "SUSPEND":
            more = {"status": "suspended", "hint": RESUME, "stops": True}
            return self._note(event, "paused", RUN_STATES["suspended"], **more)
        if (message := REPORTS.get(event.name)) is not None:
            return self._note(event, event.name.lower(), message.format_map(_Data(event.data)))
        return None

    def _note(self, event: Event, kind: str, message: str, **more: Any) -> Trouble | None:
        """Note a trouble that `event` shows; return it if it is to be published."""
        values = {**event.data, "kind": kind, "message": message, **more}
        trouble = Trouble(Trouble.NAME, event.timestamp, values)
        if (before := self.known.get(trouble.key)) is not None:
            trouble = replace(trouble, data={**values, "count": before.count + 1})
        self.known[trouble.key] = trouble
        return trouble if trouble.count.bit_count() == 1 else None

    def _disk_error(self, event: Event) -> Trouble | None:
        name, path = self._file(event)
        access = "read" if event.data.get("operation") == "read" else "write"
        reason = event.data.get("reason", "unknown error")
        message = f"QEMU could not {access} {name} ({path}): {reason}"
        if access == "read":  # the overlay has only the clusters that the guest has written
            message += f" (image: {self.image})"
        from smolvm_async.host.restrictions import find_cause  # rarely needed

        more = {"path": str(path), "stops": event.data.get("action") == "stop"}
        if not event.data.get("nospace") and (cause := find_cause(reason)) is not None:
            more["hint"] = cause.cure
        return self._note(event, "disk", message, **more)

    def _corruption(self, event: Event) -> Trouble | None:
        name, path = self._file(event)
        message = (
            f"{name[0].upper()}{name[1:]} ({path}) is damaged: {event.data.get('msg', 'corrupt')}"
        )
        hint = f"Check the file with qemu-img check {path}, and restore it from its source."
        return self._note(event, "image", message, path=str(path), hint=hint)

    def _file(self, event: Event) -> tuple[str, Path | str]:
        node = event.data.get("node-name") or event.data.get("device") or "disk"
        if node == "base":
            return "the VM's image", self.image
        if node == "disk" or node.startswith("disk-"):  # see `node_of()`
            layer = OVERLAY if node == "disk" else f"{node}.qcow2"
            return "the VM's disk", self._directory / layer
        return self._files.get(node, (f"QEMU's block device {node!r}", node))

    def stopped(self, event: Event, status: str) -> Trouble | None:
        """Note why the guest's processors stopped: `status` is QEMU's run state.

        This measures the disk's file system, so call it in a thread.
        """
        if status == "paused" or "paused" not in self.known:  # by pause(), or resumed meanwhile
            return None
        full = next((each for each in self.known.values() if each.no_space), None)
        message, hint, path = RUN_STATES.get(status, f"QEMU's run state is {status}"), RESUME, ""
        if full is not None:
            path = full.path
            found = find_file_system(Path(path))
            message = f"QEMU has paused the guest, because {found} is full: it cannot grow {path}"
            hint = f"Free some space on {found.mount}, then call resume(): the guest loses nothing."
        del self.known["paused"]
        more = {"status": status, "path": path, "hint": hint, "stops": True}
        return self._note(event, "paused", message, **more)

    def explain(self, error: E) -> E:
        """Add the troubles and the end of QEMU's log to an error, and return the error."""
        if not error.troubles:
            error.troubles = (*self.known.values(), *halted(self._pid()))
        if not getattr(error, "log", "") and (log := self._log()):
            end = "\n".join(log.splitlines()[-QUOTED_LINES:])
            error.extend(f"QEMU's log ends with:\n{end}")
            if hasattr(error, "log"):
                error.log = log
        return error


def halted(pid: int | None) -> list[Trouble]:
    """Return the trouble if QEMU's process is stopped, or waits for a disk of the host."""
    states = []
    with suppress(OSError):  # proc_pid_stat(5); no process, or it ends just now
        stats = [(thread / "stat").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
        states = [stat_fields(stat)[0] for stat in stats]
    waiting, hint = states.count("D"), ""
    if "T" in states:
        message, hint = f"QEMU's process {pid} is stopped", f"Continue it with kill -CONT {pid}."
    elif waiting:
        message = (
            f"{waiting} of the {len(states)} threads of QEMU's process {pid} wait for a disk or a "
            "file server of the host (state D)"
        )
    else:
        return []
    return [Trouble(Trouble.NAME, time.time(), {"kind": "host", "message": message, "hint": hint})]


REPORTS: Mapping[str, str] = {
    "GUEST_PANICKED": "The guest's kernel panicked ({action})",
    "GUEST_CRASHLOADED": "The guest's kernel panicked and loaded its crash kernel",
    "MEMORY_FAILURE": "The host's memory has a hardware error ({recipient}, {action})",
    "WATCHDOG": "The guest's watchdog expired ({action})",
}


class _Data(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "unknown"
