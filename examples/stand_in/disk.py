"""Make the stand-in's disk from two directories, without root and without mounting anything.

Two builds make the same disk, since identifiers, times, owners and order are fixed. All programs
run in the work directory with relative names, since some of them give a special meaning to
characters that a path may contain.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from smolvm_async.foundation import process
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build.workshop import MKE2FS_CONF, search_path

EPOCH = 1_704_067_200  # 2024-01-01, the date of every file
MIB = 1 << 20
ESP_START, ESP_SIZE = 1 * MIB, 64 * MIB
ROOT_START, ROOT_SIZE = ESP_START + ESP_SIZE, 64 * MIB
SIZE = ROOT_START + ROOT_SIZE + 1 * MIB  # the last MiB has the second copy of the GPT
SECTOR = 512

DISK_ID = "5AFE0000-57A2-4D01-8000-000000000000"
ESP_ID = "5AFE0000-57A2-4D01-8000-000000000001"
ROOT_ID = "5afe0000-57a2-4d01-8000-000000000002"  # the UUID of the partition and of its file system

GPT = f"""\
label: gpt
label-id: {DISK_ID}
unit: sectors
start={ESP_START // SECTOR}, size={ESP_SIZE // SECTOR}, type=U, uuid={ESP_ID}, name=esp
start={ROOT_START // SECTOR}, size={ROOT_SIZE // SECTOR}, type=L, uuid={ROOT_ID}, name=root
"""

# The signed GRUB looks for its configuration in a directory named after its distribution.
CONFIGURATIONS = ("EFI/debian/grub.cfg", "EFI/ubuntu/grub.cfg")

_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC0",  # FAT stores local time
    "SOURCE_DATE_EPOCH": str(EPOCH),
    "E2FSPROGS_FAKE_TIME": str(EPOCH),
    "MTOOLS_SKIP_CHECK": "1",
    "MTOOLSRC": "/dev/null",
    "MKE2FS_CONFIG": "mke2fs.conf",
}
_FAT = f"base.raw@@{ESP_START}"


async def make_base(work: Path) -> Path:
    """Make `base.raw` in `work`, without a grub.cfg, from the directories `esp` and `root`."""
    base = work / "base.raw"
    base.touch()
    os.truncate(base, SIZE)
    (work / "gpt").write_text(GPT)
    await _run(work, "sh", "-c", "exec sfdisk --quiet base.raw <gpt")
    await _make_esp(work)
    await _make_root(work)
    return base


async def _make_esp(work: Path) -> None:
    sectors = str(ESP_SIZE // SECTOR)
    hidden = str(ESP_START // SECTOR)
    geometry = ("-T", sectors, "-H", hidden, "-h", "64", "-s", "32")
    await _run(work, "mformat", "-i", _FAT, *geometry, "-N", "5AFE0001", "-v", "STAND-IN", "::")
    paths = await in_background(_contents, work / "esp")
    directories = {str(Path(name).parent) for name in CONFIGURATIONS}
    directories |= {path for path in paths if (work / "esp" / path).is_dir()}
    await _run(work, "mmd", "-i", _FAT, *(f"::/{path}" for path in sorted(directories)))
    for path in paths:
        if path not in directories:
            await _run(work, "mcopy", "-m", "-i", _FAT, f"esp/{path}", f"::/{path}")


async def _make_root(work: Path) -> None:
    paths = await in_background(_contents, work / "root")
    (work / "mke2fs.conf").write_text(MKE2FS_CONF)
    flags = ["-q", "-t", "ext4", "-d", "root", "-U", ROOT_ID, "-L", "stand-in", "-m", "0"]
    extended = f"offset={ROOT_START},hash_seed={ROOT_ID},root_owner=0:0,nodiscard"
    await _run(work, "mke2fs", *flags, "-E", extended, "base.raw", f"{ROOT_SIZE // 1024}k")
    (work / "inodes").write_text("".join(map(_reset_inode, ["", *paths])))
    await _run(work, "debugfs", "-w", "-f", "inodes", f"base.raw?offset={ROOT_START}")


def _reset_inode(path: str) -> str:
    """Return debugfs commands that reset the owner and times that mke2fs copied to an inode."""
    fields = {"uid": "0", "gid": "0"}
    for time in ("atime", "ctime", "mtime", "crtime"):
        fields |= {time: f"@{EPOCH}", f"{time}_extra": "0"}
    return "".join(f"sif /{path} {field} {value}\n" for field, value in fields.items())


def _contents(directory: Path) -> list[str]:
    """Set the date of every file in `directory`; return their paths, sorted."""
    paths = sorted(directory.rglob("*"))
    for path in paths:
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
    return [str(path.relative_to(directory)) for path in paths]


async def make_variant(base: Path, work: Path, kernel_arguments: Sequence[str]) -> Path:
    """Make `disk.qcow2` in `work`: a copy of the base with a grub.cfg."""
    await _run(work, "cp", "--sparse=always", "--no-preserve=mode", base, "base.raw")
    configuration = work / "grub.cfg"
    configuration.write_text(grub_configuration(kernel_arguments))
    os.utime(configuration, (EPOCH, EPOCH))
    for path in CONFIGURATIONS:
        await _run(work, "mcopy", "-m", "-i", _FAT, "grub.cfg", f"::/{path}")
    await _run(work, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "base.raw", "disk.qcow2")
    return work / "disk.qcow2"


def grub_configuration(kernel_arguments: Sequence[str]) -> str:
    """Return the content of grub.cfg; the arguments must not contain single quotes."""
    arguments = ["console=ttyS0", "quiet", f"root=UUID={ROOT_ID}", *kernel_arguments]
    quoted = " ".join(f"'{argument}'" for argument in arguments)
    return f"set timeout=0\nlinux /vmlinuz {quoted}\ninitrd /initrd.img\nboot\n"


async def _run(work: Path, *argv: str | Path) -> None:
    await process.run(argv, cwd=work, env={**_ENVIRONMENT, "PATH": search_path()})
