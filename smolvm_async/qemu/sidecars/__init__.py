"""Sidecars: the processes that run beside QEMU, one file for each.

To add a sidecar, write `NAME.py` in this folder, whose `SIDECAR` is an instance of a subclass of
`Sidecar`, and put `NAME` into `sidecars` of the profile of each guest OS that needs it. Nothing
else has to know it: this room asks the class, and the rooms that it must import from, not be
imported by, are told. `host` is given the programs to look for, `state` the directories to make;
the names of a sidecar's files follow from its name (`state.names.SIDECARS`), since a VM's
directory is also read where nothing knows which guest OS is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from smolvm_async.guests import GuestProfile
from smolvm_async.host.distribution import Program
from smolvm_async.qemu.sidecars.sidecar import Attachment, Sidecar
from smolvm_async.state import names

__all__ = ["SIDECARS", "Attachment", "Sidecar", "directories", "programs"]

SIDECARS: Mapping[str, Sidecar] = {
    name: import_module(f"{__name__}.{name}").SIDECAR for name in sorted(names.SIDECARS)
}


def programs(profile: GuestProfile) -> list[Program]:
    """Return the programs of a guest's sidecars, for `host.find_tools`."""
    return [SIDECARS[name].program for name in profile.sidecars]


def directories(profile: GuestProfile) -> tuple[str, ...]:
    """Return the directories in which a guest's sidecars keep their state, for `state.Parts`."""
    kept = (SIDECARS[name].directory for name in profile.sidecars)
    return tuple(name for name in kept if name)
