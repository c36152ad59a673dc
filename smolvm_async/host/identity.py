"""The identity of a host: does a process id in a VM's record mean anything here?

Several hosts, containers and PID namespaces may share a data directory. A file lock is no proof
that an owner is dead: on some file systems (NFS with local locks, 9p, some of FUSE), each host sees
only its own locks. So a record names the host of its owner, and `relation` decides:

- A kernel has one boot id, and most containers share it. So the same boot id means the same kernel,
  which knows all its locks, whatever the host name is: a restarted container has a new host name
  and a new PID namespace. Process ids mean something only in the same PID namespace.
- Another boot id means another host, or an earlier boot of this host. The host name and the machine
  id together tell the two apart. One of them is not enough: hosts that were cloned from one image
  share the machine id, and many hosts are called `localhost`. Containers often have no machine id,
  so a container that restarts after a reboot is this host only if it has kept its name.
- In doubt, it is another host: its VMs are not touched, and `prune(gone_host=)` is the way out.

A namespace's number is used again after the namespace has ended, and process ids are used again as
well. Start times within one boot are not, so `foundation.process.Identity` finds the difference.
"""

from __future__ import annotations

import hashlib
import os
from enum import Enum
from pathlib import Path
from typing import NamedTuple

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MACHINE_ID = Path("/etc/machine-id")


class HostIdentity(NamedTuple):
    """The identity of a host and of a PID namespace on it; an unknown part is empty.

    Attributes:
        name: The host name.
        machine: A hash of the machine id, which machine-id(5) asks not to publish.
        boot: The kernel's random id of this boot.
        pid_namespace: The namespace that the process ids belong to, see pid_namespaces(7).
    """

    name: str
    machine: str
    boot: str
    pid_namespace: str

    @property
    def key(self) -> str:
        """A short name of this host for file names; another boot has the same key."""
        return _hash(f"{self.name} {self.machine}")[:8]


class Relation(Enum):
    """How a recorded host is related to this host."""

    SAME_PIDS = "the same boot and PID namespace"
    SAME_KERNEL = "the same boot, but process ids mean nothing here"
    EARLIER_BOOT = "an earlier boot of this host: no process of it is left"
    ANOTHER_HOST = "another host"


def this_host() -> HostIdentity:
    """Return the identity of this host. A child process may be in another PID namespace."""
    machine = _read(MACHINE_ID)
    return HostIdentity(
        name=os.uname().nodename,
        machine=machine and _hash(machine),
        boot=_read(BOOT_ID),
        pid_namespace=_pid_namespace(),
    )


def relation(there: HostIdentity | None, here: HostIdentity) -> Relation:
    """Return how the host of a record is related to `here`.

    `there` is `None` in a record of an earlier version, which did not name the host: then assume
    this host, but do not trust its process ids.
    """
    if there is None:
        return Relation.SAME_KERNEL
    if there.boot and there.boot == here.boot:
        same = there.pid_namespace and there.pid_namespace == here.pid_namespace
        return Relation.SAME_PIDS if same else Relation.SAME_KERNEL
    if (there.name, there.machine) != (here.name, here.machine):
        return Relation.ANOTHER_HOST
    return Relation.EARLIER_BOOT if there.boot and here.boot else Relation.SAME_KERNEL


def _pid_namespace() -> str:
    """Return the PID namespace; empty if /proc shows the process ids of another one."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _hash(text: str) -> str:
    return hashlib.sha256(f"smolvm-async {text}".encode()).hexdigest()[:16]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
