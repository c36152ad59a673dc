"""The names in a VM's directory: one row for each.

To add a file to a VM's directory, add a row here, and give its content to `Parts.files` in
`vm/prepare.py`. By default, a kept VM keeps the file, and the file is deleted with the VM. A new
required file makes the kept VMs of earlier versions unstartable.
"""

from __future__ import annotations

from typing import NamedTuple

from smolvm_async.guests import BUILT_IN, GUESTS


class Row(NamedTuple):
    """The rules for one file, directory or socket.

    Attributes:
        required: A kept VM does not start without it, whatever its guest is. `Parts` requires the
            files that only some guests have.
        secret: Removed when an unkept VM stops, although the VM's directory stays until delete().
        of_run: A socket of one run: removed after the run and before the next.
        mark: Shows that the directory is this library's. Removed last, so that a half-deleted
            directory is still recognized.
    """

    required: bool = False
    secret: bool = False
    of_run: bool = False
    mark: bool = False


ROWS: dict[str, Row] = {}


def _row(name: str, **rules: bool) -> str:
    ROWS[name] = Row(**rules)
    return name


RECORD = _row("vm.json", mark=True)
NEW_RECORD = _row("vm.json.new")  # the record, while it is written
SCRATCH = _row("scratch", mark=True)  # no VM uses the directory, and anybody may remove it

OVERLAY = _row("overlay.qcow2", required=True)  # the VM's disk
VARS = _row("vars.fd", secret=True)  # UEFI variables
TPM = _row("tpm", secret=True)  # swtpm's state, a directory
SEED = _row("seed.iso", secret=True)  # cloud-init reads it
SSH_KEY = _row("ssh_key", secret=True)
HOST_KEY = _row("ssh_host_ed25519_key", secret=True)
AUTHORIZED_KEYS = _row("authorized_keys", secret=True)

CONTROL = _row("control.sock", of_run=True)  # other processes reach the owner by it
VNC = _row("vnc.sock", of_run=True)


def log_name(process: str) -> str:
    """Return the name of the log of `qemu` or of a sidecar."""
    return f"{process}.log"


_row(log_name("qemu"))

# The processes that may run beside QEMU. Each is described in a room that this one must not import,
# so the names of its files follow from its name: its directory is `NAME`, other files begin with
# `NAME.`. Only swtpm's directory has a row, since it is called `tpm` in the VMs of all versions.
SIDECARS = frozenset(
    name for guest in (*GUESTS.values(), *BUILT_IN.values()) for name in guest.sidecars
)

REQUIRED = tuple(name for name, row in ROWS.items() if row.required)
SECRETS = (*(name for name, row in ROWS.items() if row.secret), *SIDECARS)
SOCKETS = tuple(name for name, row in ROWS.items() if row.of_run)
MARKS = tuple(name for name, row in ROWS.items() if row.mark)


def is_ours(name: str) -> bool:
    """Return whether this library gives this name to a file in a VM's directory."""
    return name in ROWS or name.partition(".")[0] in SIDECARS
