"""Host directories in a Linux guest, over virtio-9p.

Each shared directory is a backend (`-fsdev`), which QEMU takes only on its command line, and a
device. A snapshot of a guest contains its devices, and the snapshot of a ready guest that a warm
start loads has none. So every Linux machine has one spare PCI slot (`pcie-root-port`), and the
devices are plugged into it: before a guest boots, or after a saved guest goes on. A PCI slot has
eight functions, one for each directory. The guest looks at a slot when function 0 appears, so
function 0 comes last.

QEMU refuses to save a machine while its guest has a share mounted, and a clone has other
directories. So a snapshot needs an empty slot, too: see `vm/mounting.py`.

A read-only share has `security_model=none`: the guest sees the files as they are, with their
symbolic links, and QEMU changes nothing. In a writable share of this kind, symbolic links to any
path of the host and setuid files that the guest makes would become real on the host. So a writable
share has `mapped-xattr`: QEMU keeps such modes, owners and links in attributes of ordinary files.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from smolvm_async.errors import MonitorError
from smolvm_async.qemu.arguments import share_tag
from smolvm_async.qemu.monitor import Monitor

SLOT = "mounts"  # the id of the spare slot in the profiles of `guests/linux.py`
PATIENCE = 30.0  # seconds for a guest to let go of the devices
LOOK = 0.02  # seconds between two looks at the slot


async def plug(monitor: Monitor, count: int) -> None:
    """Plug the devices of `count` shares into the slot, unless they are there."""
    if await _plugged(monitor):
        return
    for index in reversed(range(count)):
        name = share_tag(index)
        where = {"bus": SLOT, "addr": f"0.{index}", "multifunction": True}
        device = {"driver": "virtio-9p-pci", "id": name, "fsdev": name, "mount_tag": name}
        await monitor.execute("device_add", {**device, **where})


async def unplug(monitor: Monitor) -> None:
    """Take all devices out of the slot, if there are any; the guest has nothing mounted.

    Raises:
        MonitorError: QEMU still serves a mount, or the guest does not let go of the devices.
    """
    reasons = (await monitor.execute("query-migrate")).get("blocked-reasons", [])
    if reasons:
        raise MonitorError(f"a share is still in use: {'; '.join(reasons)}", command="device_del")
    deadline = time.monotonic() + PATIENCE
    while await _plugged(monitor):
        if time.monotonic() > deadline:
            message = f"the guest has not released its shares within {PATIENCE:g} s"
            raise MonitorError(message, command="device_del")
        with suppress(MonitorError):  # the guest has been asked, or the device has just gone
            await monitor.execute("device_del", {"id": share_tag(0)})  # ejects the whole slot
        await asyncio.sleep(LOOK)


async def _plugged(monitor: Monitor) -> bool:
    found = await monitor.execute("qom-list", {"path": "/machine/peripheral"})
    return any(part["type"] == "child<virtio-9p-pci>" for part in found)
