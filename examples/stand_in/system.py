"""The stand-in's files: the packages that contain them, and their places in the guest.

The unpacked packages become two directories: `esp`, the EFI system partition without grub.cfg
(which differs between variants), and `root`, the guest's root file system.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from smolvm_async.errors import HostError
from smolvm_async.foundation import process
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build import packages
from smolvm_async.images.build.boot_files import (
    KERNEL_FILES,
    find_file,
    install,
    install_drivers,
    kernel_packages,
    make_initramfs,
    modules,
    reset_modes,
)
from smolvm_async.images.build.workshop import CLOUD_KERNELS, distribution

GUEST_SCRIPTS = Path(__file__).parent / "guest"

SIGNED = ("shim-signed", "grub-efi-amd64-signed")
SHIMS = ("shimx64.efi.signed", "shimx64.efi.signed.latest", "shimx64.efi.dualsigned")
# The agent, and an SSH server in the place of OpenSSH for Windows.
PROGRAMS = ("qemu-ga", "dropbear", "sftp-server")
# Its password is "stand-in" (`openssl passwd -5`). The home is the directory that the agent is in.
ACCOUNT = "Administrator:$5$standin$gGcMKGUpvuGEgk0jbrF.PzvutKmpQ36CcVMDD.xBp84:0:0::/tmp:/bin/sh\n"
LOADER = "ld-linux-x86-64.so.2"
GRUBS = ("grubx64.efi.signed", "grubx64.efi.signed.latest")

DISK_DRIVERS = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "crc32c_generic", "ext4")
OTHER_DRIVERS = (
    "virtio_console",
    "virtio_net",
    "af_packet",
    "button",
    "evdev",
    "efivarfs",
    "tpm_crb",
    "tpm_tis",
    "pvpanic",
    "pvpanic_mmio",
    "pvpanic_pci",
)


class Flavour(NamedTuple):
    """A flavour of the guest: its kernel by distribution, its additional drivers and scripts."""

    name: str
    kernels: Mapping[str, str]
    drivers: tuple[str, ...] = ()
    scripts: tuple[str, ...] = ()


PLAIN = Flavour("plain", CLOUD_KERNELS)
DESKTOP = Flavour(  # needs USB, which cloud kernels do not support
    "desktop",
    {"debian": "linux-image-amd64", "ubuntu": "linux-image-generic"},
    drivers=("xhci_pci", "usbhid", "hid_generic", "psmouse"),
    scripts=("desktop",),
)


async def package_names(cache: Path, flavour: Flavour) -> list[str]:
    """Return the packages to download; the package lists must be in `cache`."""
    needed = await packages.dependencies(["qemu-guest-agent", "dropbear-bin"], cache)
    kernel = await kernel_packages(flavour.kernels[distribution("the stand-in")], cache)
    return [
        *SIGNED,
        "busybox-static",
        *("qemu-guest-agent", "dropbear-bin", "openssh-sftp-server"),
        *(name for name in needed if name.startswith(("lib", "zlib"))),
        *kernel,
    ]


async def arrange(unpacked: Path, work: Path, flavour: Flavour) -> None:
    """Make `esp` and `root` in `work` from the unpacked packages.

    Raises:
        HostError: If the packages lack an expected file.
    """
    esp, root = work / "esp", work / "root"
    libraries = await _libraries(unpacked)
    busybox = await asyncio.to_thread(find_file, unpacked, ["busybox"])
    applets = await process.run([busybox, "--list"])
    disk_drivers = await modules(unpacked, DISK_DRIVERS)
    all_drivers = await modules(unpacked, [*DISK_DRIVERS, *OTHER_DRIVERS, *flavour.drivers])
    other_drivers = [driver for driver in all_drivers if driver not in disk_drivers]
    programs = (libraries, applets.split(), other_drivers, flavour.scripts)
    await in_background(_arrange_root, unpacked, root, *programs)
    await in_background(_arrange_esp, unpacked, esp, disk_drivers)


def _arrange_root(
    unpacked: Path,
    root: Path,
    libraries: Iterable[Path],
    applets: Iterable[str],
    drivers: Sequence[Path],
    scripts: Iterable[str],
) -> None:
    directories = (
        "bin",
        "dev",
        "etc/dropbear",
        "lib/modules",
        "lib64",
        "proc",
        "run",
        "sys",
        "tmp",
    )
    for name in (*directories, "usr/lib"):
        (root / name).mkdir(parents=True)
    (root / "sbin").symlink_to("bin")
    (root / "etc/resolv.conf").touch()
    (root / "etc/passwd").write_text(ACCOUNT)
    install(find_file(unpacked, ["busybox"]), root / "bin/busybox", 0o755)
    for applet in applets:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "bin/init").unlink(missing_ok=True)  # install() would write through the link to busybox
    for script in ("init", "shutdown", *scripts):
        install(GUEST_SCRIPTS / f"{script}.sh", root / "bin" / script, 0o755)
    for name in ("powershell", "cmd", "taskkill"):
        install(GUEST_SCRIPTS / "windows.sh", root / f"bin/{name}.exe", 0o755)
    # The library's own program for Linux takes the place of the one for PowerShell.
    with as_file(files("smolvm_async.controls.agent").joinpath("files.sh")) as steps:
        install(steps, root / "bin/files.sh", 0o755)
    install(GUEST_SCRIPTS / "network.sh", root / "etc/network.sh", 0o755)
    for program in PROGRAMS:
        install(find_file(unpacked, [program]), root / "bin" / program, 0o755)
    (root / "usr/lib/sftp-server").symlink_to("/bin/sftp-server")  # for dropbear
    for library in libraries:
        install(library, root / "lib" / library.name, 0o755)
    install(find_file(unpacked, [LOADER]), root / "lib64" / LOADER, 0o755)
    install_drivers(drivers, root / "lib/modules")
    reset_modes(root)


def _arrange_esp(unpacked: Path, esp: Path, drivers: Sequence[Path]) -> None:
    install(find_file(unpacked, SHIMS), esp / "EFI/BOOT/BOOTX64.EFI")
    install(find_file(unpacked, GRUBS), esp / "EFI/BOOT/grubx64.efi")
    install(find_file(unpacked, KERNEL_FILES), esp / "vmlinuz")
    tree = esp.with_name("initramfs")
    initrd = make_initramfs(unpacked, GUEST_SCRIPTS / "initramfs.sh", drivers, tree)
    (esp / "initrd.img").write_bytes(initrd)


async def _libraries(unpacked: Path) -> list[Path]:
    """Find the programs' libraries with the packages' own loader; raise if one is the host's."""
    path = f"{unpacked}/lib/x86_64-linux-gnu:{unpacked}/usr/lib/x86_64-linux-gnu"
    loader = await asyncio.to_thread(find_file, unpacked, [LOADER])
    listing = ""
    for name in PROGRAMS:
        program = await asyncio.to_thread(find_file, unpacked, [name])
        listing += await process.run(
            [loader, "--inhibit-cache", "--library-path", path, "--list", program]
        )
    found = {Path(word) for word in re.findall(r"=> (/.*) \(0x", listing)}
    libraries = [library for library in sorted(found) if library.name != LOADER]
    strangers = [library for library in libraries if unpacked not in library.parents]
    if strangers or "not found" in listing:
        raise HostError(f"a program needs libraries that its packages lack:\n{listing}")
    return libraries
