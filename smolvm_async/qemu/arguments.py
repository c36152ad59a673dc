"""Make QEMU's command line, in a pure function from values to a list of strings.

No value of the user becomes part of an option's syntax: the base image is an inherited descriptor,
every other file has a fixed name in the working directory, the firmware's paths are JSON, and a VM
id contains no character that is special to QEMU.

To add a device for every guest, add a line to `qemu_arguments`. To add a device for one guest OS,
add an entry to `devices` of its profile.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.guests import GuestProfile
from smolvm_async.state.names import AUTHORIZED_KEYS, HOST_KEY, OVERLAY, SEED, VARS

if TYPE_CHECKING:
    from smolvm_async.host.accelerator import Accelerator
    from smolvm_async.host.shares import Share
    from smolvm_async.host.tools import HostTools

AGENT_PORT = "agent"  # the guest agent's virtio-serial port, as VSERPORT_CHANGE names it
PARKED_PORT = "smolvm.control"  # the name by which the guest's parked process finds its port
DISPLAY = "display"  # the id of the display adapter
NETWORK = "network"  # the id of the network's backend
RAM = "pc.ram"  # the name that q35 gives to RAM without a file: migration compares the names
# Nothing can wake a guest that sleeps in S3, and its power button is dead. S4 would end the VM. The
# firmware's ACPI tables then offer neither state, so a guest that "suspends" only idles (s2idle).
NO_SLEEP = ("-global", "ICH9-LPC.disable_s3=1", "-global", "ICH9-LPC.disable_s4=1")
SCREEN = "/dev/fdset/2"  # the file that `screendump` writes
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_NAMESPACE = uuid.UUID("6e3d3f7c-2f0b-4f7c-9d5e-6b0c6a5d8f10")


class Descriptors(NamedTuple):
    """The descriptors that QEMU inherits to exchange data with this process."""

    monitor: int
    console: int
    screen: int
    parked: int | None = None  # the parked process's port, if the guest has that process
    agent: int | None = None  # the guest agent's port, if the library speaks to the agent


class DirectBoot(NamedTuple):
    """A Linux kernel that QEMU loads without a boot loader.

    Attributes:
        kernel: The kernel's descriptor, which QEMU inherits.
        initrd: The initramfs's descriptor, which QEMU inherits, or `None`.
        arguments: The kernel's command line.
    """

    kernel: int
    initrd: int | None
    arguments: str


class RAMFile(NamedTuple):
    """A file with the guest's RAM, which QEMU maps instead of allocating memory.

    Attributes:
        fd: The file's descriptor, which QEMU inherits.
        shared: Whether the guest's writes change the file. If not, the pages that the guest writes
            become its own, and it shares all others with the guests that map the same file.
    """

    fd: int
    shared: bool


class MachineSpec(NamedTuple):
    """The values that define the machine of one VM.

    Attributes:
        tools: QEMU, the programs of its sidecars, and the firmware (`None` means SeaBIOS).
        base_image: The open base image: a descriptor that QEMU inherits.
        sidecars: The names of the processes that run beside QEMU.
        disk_format: The format of the base image: `qcow2` or `raw`.
        machine_type: The versioned type that a kept VM was created with; by default the newest.
        direct_boot: The kernel, if the image has no boot loader of its own.
        layers: The files of the disk above the base image, the one that the guest writes to last.
        ram: The file with the guest's RAM, if there is one.
        identity: The id that the UUID and the MAC address follow from; by default, the VM's id.
        incoming: Whether QEMU waits for the state of a saved machine (`migrate-incoming`).
        isolated: Whether QEMU itself passes nothing on that the guest sends to the network.
        shares: The host directories of the guest: see `mounts.py`.
    """

    config: VMConfig
    tools: HostTools
    accelerator: Accelerator
    base_image: int
    sidecars: tuple[str, ...]
    disk_format: str = "qcow2"
    machine_type: str | None = None
    direct_boot: DirectBoot | None = None
    layers: tuple[str, ...] = (OVERLAY,)
    ram: RAMFile | None = None
    identity: str = ""
    incoming: bool = False
    isolated: bool = False
    shares: tuple[Share, ...] = ()


def machine_uuid(vm_id: str) -> uuid.UUID:
    """Return the UUID of a machine with this identity."""
    return uuid.uuid5(_NAMESPACE, vm_id)


def qemu_arguments(
    spec: MachineSpec, descriptors: Descriptors, sidecar_options: Sequence[str]
) -> list[str]:
    """Return the whole command line of one VM."""
    config, tools, accelerator = spec.config, spec.tools, spec.accelerator
    direct_boot = spec.direct_boot
    profile = config.profile
    identity = machine_uuid(spec.identity or config.vm_id)
    machine = f"{spec.machine_type or profile.machine_type},{profile.machine_options}"
    if tools.firmware is not None:
        machine += ",pflash0=code,pflash1=vars"
    if spec.ram is not None:
        machine += f",memory-backend={RAM}"
    global_options = (*profile.globals, *profile.accelerator_globals.get(accelerator.name, ()))
    return [
        str(tools.qemu),
        *("-name", f"guest={config.vm_id},debug-threads=on"),
        *("-uuid", str(identity)),
        "-nodefaults",
        "-no-user-config",
        "-S",  # the guest waits for `cont`, until everything is attached
        *("-machine", machine),
        *("-accel", accelerator.option_for(config.memory)),
        *("-cpu", profile.cpu[accelerator.name]),
        *("-smp", f"sockets=1,cores={config.cpus},threads=1"),
        *("-m", f"size={config.memory}M"),
        *(_ram(spec.ram, config.memory) if spec.ram is not None else ()),
        *(("-incoming", "defer") if spec.incoming else ()),
        *("-rtc", profile.rtc),
        *(word for option in global_options for word in ("-global", option)),
        *NO_SLEEP,
        *("-sandbox", SANDBOX),
        *("-chardev", f"socket,id=monitor,fd={descriptors.monitor}"),
        *("-qmp", "chardev:monitor"),  # QEMU 11.1 warns of -mon; -object monitor-qmp is new there
        *("-chardev", f"socket,id=console,fd={descriptors.console}"),
        *("-serial", "chardev:console"),
        *_firmware(tools, keep=config.keep),
        *(_direct_boot(direct_boot) if direct_boot is not None else ()),
        *_disk(spec, profile.disk_bus),
        *_network(identity, ssh=profile.login != "none", isolated=spec.isolated),
        *_login(profile, config.vm_id, direct_boot),
        *_serial_ports(descriptors.agent, descriptors.parked),
        *_display(config.resolution, descriptors.screen, usb=profile.usb),
        *("-device", "pvpanic"),  # a guest's panic becomes GUEST_PANICKED
        *("-device", "vmgenid,guid=auto"),  # a restored guest reseeds its random numbers
        *(word for device in profile.devices for word in ("-device", device)),
        *_shares(spec.shares),
        *sidecar_options,
    ]


def _firmware(tools: HostTools, *, keep: bool) -> list[str]:
    firmware = tools.firmware
    if firmware is None:
        return []
    return [
        *("-blockdev", _node("code", firmware.code_format, str(firmware.code), read_only=True)),
        *("-blockdev", _node("vars", firmware.vars_format, VARS, cache=_cache(keep=keep))),
    ]


def _direct_boot(boot: DirectBoot) -> list[str]:
    return [
        *("-kernel", f"/proc/self/fd/{boot.kernel}"),
        *(("-initrd", f"/proc/self/fd/{boot.initrd}") if boot.initrd is not None else ()),
        *("-append", boot.arguments),
    ]


def _ram(file: RAMFile, memory: int) -> list[str]:
    share = "on" if file.shared else "off"
    options = f"id={RAM},size={memory}M,mem-path=/proc/self/fd/{file.fd},share={share}"
    return ["-object", f"memory-backend-file,{options}"]


def node_of(layer: str) -> str:
    """Return the name of the block node of a layer of the disk."""
    return "disk" if layer == OVERLAY else layer.removesuffix(".qcow2")


def layer_options(layer: str, backing: str | None, *, keep: bool) -> dict[str, object]:
    """Return the options (`blockdev-add`) of a layer that the guest writes to.

    Args:
        backing: The block node below; `None` if `blockdev-snapshot` sets it later.
    """
    cache = _cache(keep=keep)
    return {
        "driver": "qcow2",
        "node-name": node_of(layer),
        "file": {"driver": "file", "filename": layer, "discard": "unmap", "cache": cache},
        "backing": backing,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": cache,
    }


def _disk(spec: MachineSpec, bus: str) -> list[str]:
    *frozen, top = spec.layers
    below = ["base", *map(node_of, frozen)]
    disk = node_of(top)
    scsi = [
        *("-device", "virtio-scsi-pci,id=scsi,iothread=disk-thread"),
        *("-device", f"scsi-hd,drive={disk},bootindex=1"),
    ]
    virtio = ["-device", f"virtio-blk-pci,drive={disk},iothread=disk-thread,bootindex=1"]
    return [
        *("-add-fd", f"fd={spec.base_image},set=1"),
        *("-blockdev", _node("base", spec.disk_format, "/dev/fdset/1", read_only=True)),
        *(
            word
            for layer, backing in zip(frozen, below, strict=False)
            for word in ("-blockdev", _node(node_of(layer), "qcow2", layer, backing=backing))
        ),
        *("-blockdev", json.dumps(layer_options(top, below[-1], keep=spec.config.keep))),
        *("-object", "iothread,id=disk-thread"),
        *(scsi if bus == "scsi" else virtio),
    ]


def _network(identity: uuid.UUID, *, ssh: bool, isolated: bool) -> list[str]:
    # An empty romfile= leaves out the boot ROM, which would try the network before the disk.
    # With host port 0 the kernel chooses a free port, so two VMs never get the same port.
    forward = ",hostfwd=tcp:127.0.0.1:0-:22" if ssh else ""
    restrict = ",restrict=on" if isolated else ""
    mac = "52:54:00:" + identity.bytes[:3].hex(":")  # QEMU's own range of addresses
    return [
        *("-netdev", f"user,id={NETWORK}{restrict}{forward}"),
        *("-device", f"virtio-net-pci,netdev={NETWORK},mac={mac},romfile="),
    ]


def _login(profile: GuestProfile, vm_id: str, direct_boot: DirectBoot | None) -> list[str]:
    # A new guest has collected no entropy yet, so generating its first keys would block.
    entropy = ["-device", "virtio-rng-pci"]
    own = [
        *("-fw_cfg", f"name=opt/smolvm/authorized_keys,file={AUTHORIZED_KEYS}"),
        *("-fw_cfg", f"name=opt/smolvm/ssh_host_ed25519_key,file={HOST_KEY}"),
        # A restored guest reads these files with the sizes of the guest that was saved.
        *("-fw_cfg", f"name=opt/smolvm/hostname,string={vm_id:<64}"),
    ]
    if profile.login == "nocloud":
        seed = _node("seed", "raw", SEED, read_only=True)
        # This library may have built the disk; such a guest boots a kernel and reads fw_cfg.
        both = own if direct_boot is not None else []
        return [*entropy, "-blockdev", seed, "-device", "virtio-blk-pci,drive=seed", *both]
    return [*entropy, *own] if profile.login == "fw_cfg" else []


def _serial_ports(agent: int | None, parked: int | None) -> list[str]:
    # Without a channel, too, the guest keeps the port: snapshots have it.
    backend = "null" if agent is None else f"socket,fd={agent}"
    ports = [(AGENT_PORT, backend, "org.qemu.guest_agent.0")]
    if parked is not None:
        ports.append(("parked", f"socket,fd={parked}", PARKED_PORT))
    # The first port is for a console. Each port has two queues, which take descriptors and time; by
    # default, QEMU makes 31 ports.
    options = ["-device", f"virtio-serial-pci,max_ports={len(ports) + 1}"]
    for port, backend, name in ports:
        options += ["-chardev", f"{backend},id={port}"]
        options += ["-device", f"virtserialport,id={port},chardev={port},name={name}"]
    return options


def share_tag(index: int) -> str:
    """Return the name by which the guest mounts a share; also the id of the share in QEMU."""
    return f"mount{index}"


def _shares(shares: Sequence[Share]) -> list[str]:
    """Return the backends of the shares; `mounts.py` plugs their devices in."""
    words = []
    for index, share in enumerate(shares):
        model = "mapped-xattr" if share.writable else "none,readonly=on"
        # Files of several file systems below the directory may have the same inode number.
        options = f"security_model={model},multidevs=remap"
        words += ["-fsdev", f"local,id={share_tag(index)},path=/proc/self/fd/{share.fd},{options}"]
    return words


def _display(resolution: tuple[int, int], screen: int, *, usb: bool) -> list[str]:
    width, height = resolution
    # Firmware and guest read the resolution from the EDID, which can describe 4K only with at
    # most 50 Hz (here in mHz). A 4K picture takes 32 MiB at 4 bytes per pixel.
    mode = f"edid=on,xres={width},yres={height},refresh_rate=50000,vgamem_mb=32"
    return [
        *("-display", "none"),
        *("-vnc", "none,password=on,share=ignore"),  # `vnc.py` makes it listen
        *("-add-fd", f"fd={screen},set=2"),
        *("-device", f"VGA,id={DISPLAY},{mode}"),
        # q35 has no USB controller of its own.
        *(("-device", "qemu-xhci", "-device", "usb-tablet") if usb else ()),
    ]


def _cache(*, keep: bool) -> dict[str, bool]:
    # Flush only for a kept VM: any other VM's files are removed when the VM ends.
    return {"direct": False, "no-flush": not keep}


def _node(
    name: str,
    image_format: str,
    path: str,
    *,
    read_only: bool = False,
    cache: dict[str, bool] | None = None,
    backing: str | None = None,
) -> str:
    caching = {} if cache is None else {"cache": cache}
    chained = {} if backing is None else {"backing": backing}
    read_only = read_only or backing is not None
    return json.dumps(
        {
            "driver": image_format,
            "node-name": name,
            "read-only": read_only,
            "file": {"driver": "file", "filename": path, "read-only": read_only, **caching},
            **caching,
            **chained,
        }
    )
