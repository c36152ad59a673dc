"""QEMU's command line: a pure function from values to a list of strings.

Nothing that a user can choose becomes part of an option's own syntax: the base image is an
inherited descriptor, every other file has a fixed name in the working directory, the firmware's
paths are JSON, and a VM id has no character that means anything to QEMU.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import NamedTuple

from smolvm_async.config import VMConfig
from smolvm_async.host import Accelerator, HostTools
from smolvm_async.state import OVERLAY, VARS

AGENT_PORT = "agent"  # the guest agent's virtio-serial port, as VSERPORT_CHANGE names it
DISPLAY = "display"  # the display adapter
SCREEN = "/dev/fdset/2"  # where `screendump` writes to
_NAMESPACE = uuid.UUID("6e3d3f7c-2f0b-4f7c-9d5e-6b0c6a5d8f10")


class Descriptors(NamedTuple):
    """Descriptors that QEMU inherits."""

    monitor: int
    console: int
    base_image: int
    screen: int


def machine_uuid(vm_id: str) -> uuid.UUID:
    """The machine's UUID: the same for the same VM id."""
    return uuid.uuid5(_NAMESPACE, vm_id)


def mac_address(vm_id: str) -> str:
    """The network card's address, in QEMU's own range 52:54:00."""
    return ":".join(["52", "54", "00", *(f"{byte:02x}" for byte in machine_uuid(vm_id).bytes[:3])])


def qemu_arguments(
    config: VMConfig,
    tools: HostTools,
    accelerator: Accelerator,
    descriptors: Descriptors,
    attach: Sequence[str],
    machine_type: str | None = None,
) -> list[str]:
    """The whole command line of one VM.

    Args:
        attach: The options for its sidecars.
        machine_type: The one that a kept VM was made with; by default the newest.
    """
    profile = config.profile
    machine = f"{machine_type or profile.machine_type},{profile.machine_options}"
    global_options = (*profile.globals, *profile.accelerator_globals.get(accelerator.name, ()))
    return [
        str(tools.qemu),
        *("-name", f"guest={config.vm_id},debug-threads=on"),
        *("-uuid", str(machine_uuid(config.vm_id))),
        "-nodefaults",
        "-no-user-config",
        "-S",  # `cont` follows when everything is attached
        *("-machine", f"{machine},pflash0=code,pflash1=vars"),
        *("-accel", accelerator.option),
        *("-cpu", profile.cpu[accelerator.name]),
        *("-smp", f"sockets=1,cores={config.cpus},threads=1"),
        *("-m", f"size={config.memory}M"),
        *("-rtc", profile.rtc),
        *(word for option in global_options for word in ("-global", option)),
        *_sandbox(),
        *_monitor(descriptors.monitor),
        *_console(descriptors.console),
        *_firmware(tools),
        *_disk(descriptors.base_image, keep=config.keep),
        *_network(config.vm_id),
        *_agent(),
        *_display(config.resolution, descriptors.screen),
        *("-device", "pvpanic"),  # a guest's panic becomes GUEST_PANICKED
        *attach,
    ]


def _sandbox() -> list[str]:
    denied = "obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    return ["-sandbox", f"on,{denied}"]


def _monitor(fd: int) -> list[str]:
    return [
        *("-chardev", f"socket,id=monitor,fd={fd}"),
        *("-mon", "chardev=monitor,mode=control"),
    ]


def _console(fd: int) -> list[str]:
    return [
        *("-chardev", f"socket,id=console,fd={fd}"),
        *("-serial", "chardev:console"),
    ]


def _firmware(tools: HostTools) -> list[str]:
    firmware = tools.firmware
    return [
        *("-blockdev", _node("code", firmware.code_format, str(firmware.code), read_only=True)),
        *("-blockdev", _node("vars", firmware.vars_format, VARS)),
    ]


def _disk(base_image: int, *, keep: bool) -> list[str]:
    # An overlay that is thrown away with the VM need not be flushed to the host's disk.
    cache = {"direct": False, "no-flush": not keep}
    overlay = {
        "driver": "qcow2",
        "node-name": "disk",
        "file": {"driver": "file", "filename": OVERLAY, "discard": "unmap", "cache": cache},
        "backing": "base",
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": cache,
    }
    return [
        *("-add-fd", f"fd={base_image},set=1"),
        *("-blockdev", _node("base", "qcow2", "/dev/fdset/1", read_only=True)),
        *("-blockdev", json.dumps(overlay)),
        *("-object", "iothread,id=disk-thread"),
        *("-device", "virtio-scsi-pci,id=scsi,iothread=disk-thread"),
        *("-device", "scsi-hd,drive=disk,bootindex=1"),
    ]


def _network(vm_id: str) -> list[str]:
    # No boot ROM: the firmware would try the network before the disk is even looked at.
    return [
        *("-netdev", "user,id=network"),
        *("-device", f"virtio-net-pci,netdev=network,mac={mac_address(vm_id)},romfile="),
    ]


def _agent() -> list[str]:
    # Nobody listens yet; QEMU still reports when the guest agent opens its port.
    return [
        *("-chardev", f"null,id={AGENT_PORT}"),
        *("-device", "virtio-serial-pci"),
        *(
            "-device",
            f"virtserialport,id={AGENT_PORT},chardev={AGENT_PORT},name=org.qemu.guest_agent.0",
        ),
    ]


def _display(resolution: tuple[int, int], screen: int) -> list[str]:
    width, height = resolution
    # Firmware and guest read from the EDID what to show: there 4K fits in with at most 50 Hz (in
    # mHz here). At 4 bytes a pixel it takes 32 MiB.
    mode = f"edid=on,xres={width},yres={height},refresh_rate=50000,vgamem_mb=32"
    return [
        *("-display", "none"),
        *("-vnc", "none,password=on,share=ignore"),  # listens once it is told to
        *("-add-fd", f"fd={screen},set=2"),
        *("-device", f"VGA,id={DISPLAY},{mode}"),
        *("-device", "qemu-xhci"),  # q35 has no USB controller of its own
        *("-device", "usb-tablet"),
    ]


def _node(name: str, image_format: str, path: str, *, read_only: bool = False) -> str:
    return json.dumps(
        {
            "driver": image_format,
            "node-name": name,
            "read-only": read_only,
            "file": {"driver": "file", "filename": path, "read-only": read_only},
        }
    )
