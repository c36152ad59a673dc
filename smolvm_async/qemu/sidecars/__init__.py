"""Sidecars: processes that run beside QEMU. Each sidecar has a file in this folder.

To add a sidecar, write `NAME.py` in this folder, with an instance of a subclass of `Sidecar` as its
`SIDECAR`, and add `NAME` to `sidecars` in the profile of each guest OS that needs it. All other
code uses the class and need not change:

- `host` and `state` must not import this package: callers pass the programs to `host` and the
  directories to `state`. A sidecar's directory is `NAME`, and its other files begin with `NAME.`,
  because the code that lists and prunes a VM's directory may not know the guest OS.
- The doctor tests the sidecars of the guests that it examines: guests with UEFI firmware.

Add the packages of the program to `examples/setup.sh`, which installs what the tests need.
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
