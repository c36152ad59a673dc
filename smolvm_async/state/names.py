"""The names of the files in a VM's directory, with one row for each name.

To add a file to a VM's directory, add a row here, and put the file's content into `Parts.files` in
`vm/prepare.py`. By default, a kept VM keeps the file, and the file is deleted with the VM.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from smolvm_async.guests import BUILT_IN, GUESTS


class Row(NamedTuple):
    """The rules for one file, directory or socket.

    Attributes:
        secret: The file is removed when an unkept VM stops; the directory stays until delete().
        of_run: A socket of one run; it is removed after the run and before the next run.
        mark: The file marks the directory as this library's. It is removed last, so that a
            half-deleted directory is still recognized.
    """

    secret: bool = False
    of_run: bool = False
    mark: bool = False


ROWS: dict[str, Row] = {}


def _row(name: str, **rules: bool) -> str:
    ROWS[name] = Row(**rules)
    return name


RECORD = _row("vm.json", mark=True)
NEW_RECORD = _row("vm.json.new")  # the temporary name of a new record
SCRATCH = _row("scratch", mark=True)  # no VM uses the directory: any process may remove it
CLAIM = _row("host", mark=True)  # the host that uses the directory at the moment

OVERLAY = _row("overlay.qcow2")  # the VM's disk, or the first layer of the disk
# A snapshot freezes the layer that the VM writes to, and the VM goes on in a new layer. The record
# lists the layers, bottom to top.
LAYER = r"^(overlay|disk-[0-9]{1,6})\.qcow2$"
VARS = _row("vars.fd", secret=True)  # UEFI variables
TPM = _row("tpm", secret=True)  # a directory with swtpm's state
SEED = _row("seed.iso", secret=True)  # cloud-init reads it
SSH_KEY = _row("ssh_key", secret=True)
HOST_KEY = _row("ssh_host_ed25519_key", secret=True)
KNOWN_HOST = _row("ssh_known_host", secret=True)  # the host key of an image's own SSH server
AUTHORIZED_KEYS = _row("authorized_keys", secret=True)

CONTROL = _row("control.sock", of_run=True)  # the owner accepts calls of other processes here
VNC = _row("vnc.sock", of_run=True)


def log_name(process: str) -> str:
    """Return the name of the log of `qemu` or of a sidecar."""
    return f"{process}.log"


_row(log_name("qemu"))
TIMER_LOG = _row(log_name("timer"))  # of the process that ends a VM whose time is over
OWNER_LOG = _row(log_name("owner"))  # of an owner without a terminal

# The processes that may run beside QEMU. This folder must not import their descriptions, so the
# names of a sidecar's files follow from its name: its directory is `NAME`, and its other files
# begin with `NAME.`. Only swtpm's directory has a row: it is called `tpm` in VMs of all versions.
SIDECARS = frozenset(
    name for guest in (*GUESTS.values(), *BUILT_IN.values()) for name in guest.sidecars
)

SECRETS = (*(name for name, row in ROWS.items() if row.secret), *SIDECARS)
SOCKETS = tuple(name for name, row in ROWS.items() if row.of_run)
MARKS = tuple(name for name, row in ROWS.items() if row.mark)


def is_ours(name: str) -> bool:
    """Return whether this library uses `name` for a file in a VM's directory."""
    known = name in ROWS or name.partition(".")[0] in {CLAIM, *SIDECARS}
    return known or re.search(LAYER, name) is not None


def next_layer(layers: Sequence[str]) -> str:
    """Return the name of a new layer above `layers`."""
    found = re.search("[0-9]+", layers[-1])
    return f"disk-{int(found[0]) + 1 if found else 1}.qcow2"


def is_leftover(name: str) -> bool:
    """Return whether a directory that has only such files never contained a VM."""
    return name == NEW_RECORD or name.partition(".")[0] == CLAIM
