"""A cloud image, made of Debian's packages in the way that Debian makes its own images.

It has the parts of `debian-12-genericcloud`: systemd, netplan, OpenSSH, cloud-init with Debian's
configuration, a kernel for clouds, and one GPT disk with GRUB for a BIOS and, signed, for UEFI.
Nothing in it comes from this library. It is kept in the cache of built images:

    cloud/
        KEY/          bios.qcow2, uefi.qcow2 (which has no code in its first sector)
        building/     the build that is running
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from smolvm_async.foundation import process
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build.packages import exclusive
from smolvm_async.images.build.workshop import key_of, search_path, work_directory

PACKAGES = (
    *("systemd-sysv", "systemd-resolved", "libnss-resolve", "libpam-systemd", "dbus"),
    *("cloud-init", "cloud-guest-utils", "netplan.io", "iproute2", "openssh-server", "sudo"),
    *("locales", "linux-image-cloud-amd64", "grub-cloud-amd64"),
)
NOT_UNPACKED = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

RECIPE = 1  # counts the images that differ: raise it with every change of the image

SECTOR = 512
MIB = 1 << 20
BIOS_BOOT, ESP, ROOT = 1 * MIB, 4 * MIB, 20 * MIB  # where the partitions begin
SIZE = 2048 * MIB
ROOT_ID = "5afe0000-c10d-4d01-8000-000000000001"
BOOT_CODE = 440  # bytes of the first sector that are a BIOS's to run

GPT = f"""\
label: gpt
unit: sectors
1 : start={ROOT // SECTOR}, size={(SIZE - ROOT) // SECTOR - 2048}, type=L
14 : start={BIOS_BOOT // SECTOR}, size={(ESP - BIOS_BOOT) // SECTOR}, \
type=21686148-6449-6E6F-744E-656564454649
15 : start={ESP // SECTOR}, size={(ROOT - ESP) // SECTOR}, type=U
"""

GRUB_CFG = f"""\
set timeout=0
serial
terminal_output serial
search --no-floppy --fs-uuid --set=root {ROOT_ID}
linux /vmlinuz root=UUID={ROOT_ID} ro console=tty0 console=ttyS0,115200
initrd /initrd.img
echo SMOLVM: started by $grub_platform
boot
"""
GRUB_MODULES = ("biosdisk", "part_gpt", "ext2")
SIGNED_CFG = f"search --fs-uuid --set=root {ROOT_ID}\nconfigfile ($root)/boot/grub/grub.cfg\n"


class CloudImage(NamedTuple):
    """The same system twice.

    Attributes:
        bios: With GRUB in its first sector.
        uefi: Without; its EFI system partition has another one.
    """

    bios: Path
    uefi: Path


async def build_cloud_image() -> CloudImage:
    """Build the image, or find it in the cache."""
    store = xdg_home("XDG_CACHE_HOME", ".cache") / "smolvm-async" / "cloud"
    release = platform.freedesktop_os_release()
    if release["ID"] != "debian" or os.geteuid() != 0:
        pytest.skip("the cloud image is made by root of a Debian, with mmdebstrap")
    kept = store / key_of(release["VERSION_CODENAME"], str(RECIPE))
    async with exclusive(store):
        if not kept.exists():
            async with work_directory(store) as work:
                await _build(work, release["VERSION_CODENAME"])
                await in_background(os.replace, work / "image", kept)
    return CloudImage(kept / "bios.qcow2", kept / "uefi.qcow2")


async def _build(work: Path, suite: str) -> None:
    (work / "image").mkdir()
    await _install(work, suite)
    await in_background(_generalize, work / "root")
    await _make_partitions(work)
    await _install_boot_loaders(work)
    await _convert(work, "bios")
    with (work / "disk.raw").open("r+b") as disk:
        disk.write(bytes(BOOT_CODE))
    await _convert(work, "uefi")


async def _install(work: Path, suite: str) -> None:
    source = f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite} main"
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in NOT_UNPACKED]
    options.append("--dpkgopt=force-unsafe-io")  # a build that is cut off is thrown away
    included = f"--include={','.join(PACKAGES)}"
    # The mounts of mmdebstrap are in their own namespace, and go with it, however it ends.
    command = ["unshare", "--mount", "mmdebstrap", "--mode=root", "--variant=minbase"]
    await _run(work, *command, included, *options, suite, "root", source)


def _generalize(root: Path) -> None:
    """Remove all that only one machine may have, and add the files that every disk needs."""
    for path in (root / "etc/ssh").glob("ssh_host_*"):
        path.unlink()
    for name in ("hostname", "machine-id", "resolv.conf"):
        (root / "etc" / name).unlink(missing_ok=True)
    (root / "etc/machine-id").touch()
    (root / "etc/resolv.conf").symlink_to("/run/systemd/resolve/stub-resolv.conf")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost ip6-localhost\n")
    (root / "etc/default/locale").write_text("LANG=C.UTF-8\n")
    options = "rw,discard,errors=remount-ro,x-systemd.growfs"
    (root / "etc/fstab").write_text(f"UUID={ROOT_ID} / ext4 {options} 0 1\n")
    shutil.copytree(root / "usr/lib/grub/i386-pc", root / "boot/grub/i386-pc")
    (root / "boot/grub/grub.cfg").write_text(GRUB_CFG)


async def _make_partitions(work: Path) -> None:
    disk = work / "disk.raw"
    disk.touch()
    os.truncate(disk, SIZE)
    (work / "gpt").write_text(GPT)
    await _run(work, "sh", "-c", "exec sfdisk --quiet disk.raw <gpt")
    extended = f"offset={ROOT},root_owner=0:0,nodiscard"
    flags = ["-q", "-t", "ext4", "-d", "root", "-U", ROOT_ID]
    await _run(
        work, "mke2fs", *flags, "-E", extended, "disk.raw", f"{(SIZE - ROOT) // 1024 - 1024}k"
    )


async def _install_boot_loaders(work: Path) -> None:
    """Install GRUB as `grub-install` does, on a disk that is a file."""
    pc = "usr/lib/grub/i386-pc"
    prefix = "--prefix=(,gpt1)/boot/grub"
    target = ["--format=i386-pc", f"--directory=/{pc}", "--output=/core.img", prefix]
    await _run(work, "chroot", "root", "grub-mkimage", *target, *GRUB_MODULES)
    boot = bytearray((work / "root" / pc / "boot.img").read_bytes()[:BOOT_CODE])
    core = bytearray((work / "root/core.img").read_bytes())
    sector = BIOS_BOOT // SECTOR
    struct.pack_into("<Q", boot, 0x5C, sector)  # where boot.img finds the first sector of core.img
    struct.pack_into("<Q", core, SECTOR - 12, sector + 1)  # and that one the others
    with (work / "disk.raw").open("r+b") as disk:
        disk.write(boot)
        disk.seek(BIOS_BOOT)
        disk.write(core)
    await _fill_esp(work)


async def _fill_esp(work: Path) -> None:
    """Copy shim and GRUB, both signed, to the place where UEFI looks on an unknown disk."""
    (work / "esp.cfg").write_text(SIGNED_CFG)
    files = {
        "EFI/BOOT/BOOTX64.EFI": "root/usr/lib/shim/shimx64.efi.signed",
        "EFI/BOOT/grubx64.efi": "root/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
        "EFI/debian/grub.cfg": "esp.cfg",
    }
    fat = ["-i", f"disk.raw@@{ESP}"]
    geometry = ["-T", str((ROOT - ESP) // SECTOR), "-h", "64", "-s", "32"]
    await _run(work, "mformat", *fat, *geometry, "::")
    await _run(work, "mmd", *fat, "::/EFI", "::/EFI/BOOT", "::/EFI/debian")
    for name, source in files.items():
        await _run(work, "mcopy", *fat, source, f"::/{name}")


async def _convert(work: Path, name: str) -> None:
    formats = ["-f", "raw", "-O", "qcow2"]
    await _run(work, "qemu-img", "convert", *formats, "disk.raw", f"image/{name}.qcow2")
    (work / "image" / f"{name}.qcow2").chmod(0o444)


async def _run(work: Path, *argv: str) -> None:
    environment = {"LC_ALL": "C.UTF-8", "MTOOLS_SKIP_CHECK": "1", "PATH": search_path()}
    await process.run(argv, cwd=work, env=environment)
