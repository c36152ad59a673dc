"""Make the file system, boot it once to configure its packages, and convert it to the disk."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from smolvm_async.errors import CommandError
from smolvm_async.foundation import process
from smolvm_async.foundation.progress import Meter
from smolvm_async.guests.linux import DEBIAN
from smolvm_async.host.tools import choose_accelerator
from smolvm_async.images.build.workshop import MKE2FS_CONF, search_path

SIZE = "10G"  # sparse: unused blocks take no space
MEMORY = 1024  # MiB
DONE = "SMOLVM: configured"
TAIL = 3000  # characters of the console's output to show in an error
POLL = 0.5  # seconds between two reads of dpkg's output


async def make(work: Path) -> None:
    """Make the file system `root.raw` from the directory `tree`."""
    (work / "mke2fs.conf").write_text(MKE2FS_CONF)
    flags = ["-q", "-t", "ext4", "-L", "smolvm", "-m", "0", "-d", "tree"]
    extended = "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    environment = {"PATH": search_path(), "MKE2FS_CONFIG": "mke2fs.conf"}
    command = ["mke2fs", *flags, "-E", extended, "root.raw", SIZE]
    await process.run(command, cwd=work, env=environment)


async def configure(work: Path, boot_args: str, packages: int, meter: Meter) -> None:
    """Boot the file system once, so that dpkg configures its packages in the guest."""
    accelerator, _ = choose_accelerator("auto", smm=False)
    cpu = DEBIAN.cpu[accelerator.name]
    watching = asyncio.create_task(_watch(work / "console", packages, meter))
    try:
        command = _qemu(accelerator.option, cpu, boot_args)
        await process.run(command, cwd=work)
    finally:
        watching.cancel()
    console = _read(work / "console")
    if DONE not in console:
        message = (
            "The guest did not finish configuring its packages. The end of its console output:\n"
            f"{console[-TAIL:]}"
        )
        raise CommandError(message, command=tuple(command), returncode=0, output=console)


def _qemu(accelerator: str, cpu: str, boot_args: str) -> list[str]:
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-machine", "q35", "-accel", accelerator, "-cpu", cpu),
        *("-m", str(MEMORY)),
        *("-kernel", "image/kernel", "-initrd", "image/initrd"),
        *("-append", f"{boot_args} smolvm.init=/usr/lib/smolvm/configure"),
        *("-drive", "file=root.raw,format=raw,if=none,id=root,cache=unsafe"),
        *("-device", "virtio-blk-pci,drive=root"),
        *("-device", "virtio-rng-pci"),
        *("-serial", "file:console"),
    ]


async def _watch(console: Path, total: int, meter: Meter) -> None:
    while True:
        await asyncio.sleep(POLL)
        done = min(total, _read(console).count("Setting up "))
        meter.report("configuring packages in the guest", done, total)


def _read(console: Path) -> str:
    try:
        return console.read_text(errors="replace")
    except FileNotFoundError:
        return ""


async def convert(work: Path) -> None:
    """Convert `root.raw` to `image/disk.qcow2`."""
    formats = ["-f", "raw", "-O", "qcow2"]
    await process.run(["qemu-img", "convert", *formats, "root.raw", "image/disk.qcow2"], cwd=work)
    os.unlink(work / "root.raw")
