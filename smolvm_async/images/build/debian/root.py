"""The guest's files: unpacked packages, dpkg's database, and the library's own files."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from smolvm_async.foundation import process
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build import packages
from smolvm_async.images.build.boot_files import (
    KERNEL_FILES,
    KERNEL_PACKAGE,
    decompress_kernel,
    find_file,
    install,
    kernel_packages,
    make_initramfs,
    modules,
)
from smolvm_async.images.build.workshop import distribution, own_sources

GUEST = Path(__file__).parent / "guest"
OWN = "usr/lib/smolvm"  # the directory of the library's own files in the guest

# Debian's kernel for clouds is smaller, but has no vmgenid, no 9p and no USB; Ubuntu's has them.
KERNELS = {"debian": "linux-image-amd64", "ubuntu": "linux-image-virtual"}

# usr-is-merged replaces usrmerge: the builder merges the directories itself, and usrmerge would
# install Perl's modules to merge them.
WANTED = (
    *("?essential", "?priority(required)", "usr-is-merged", "apt", "ca-certificates", "curl"),
    *("git", "iproute2", "iputils-ping", "kmod", "less", "netbase", "openssh-client"),
    *("openssh-server", "procps", "python3", "sudo", "tzdata", "unzip", "xz-utils"),
)
CONFIGURED = "usr-is-merged"  # the builder has already merged the directories that it would check
MERGED = ("bin", "sbin", "lib", "lib64")
NOT_UNPACKED = (
    *("usr/share/man/*", "usr/share/info/*", "usr/share/locale/*", "usr/share/lintian/*"),
    "usr/share/doc/*/[!c]*",  # all files except the copyright
    # The largest drivers: half of all modules. None of them is for a device of this library's VMs.
    *("*/kernel/sound/*", "*/kernel/drivers/media/*", "*/kernel/drivers/iio/*"),
    *("*/kernel/drivers/net/wireless/*", "*/kernel/drivers/net/ethernet/*"),
    *("*/drm/amd/*", "*/drm/i915/*", "*/drm/nouveau/*", "*/drm/radeon/*"),
)
DRIVERS = (  # all that the boot needs; the guest loads other modules from its disk on demand
    *("virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "virtio_net", "af_packet"),
    *("virtio_console", "virtio_rng", "qemu_fw_cfg", "button", "evdev", "pvpanic", "pvpanic_pci"),
)

# Unpack the package $1 and its control files; list its files in the format of `tar -tv`.
UNPACK = """
set -eu
name=$(dpkg-deb --field "$1" Package)
dpkg-deb --control "$1" "control/$name"
dpkg-deb --fsys-tarfile "$1" | tar --extract --directory=tree --preserve-permissions \
    --no-same-owner --keep-directory-symlink --exclude-from=exclude -vv >"list/$name"
"""


async def package_names(cache: Path) -> list[str]:
    """Return the packages to download; the package lists must be in `cache`."""
    kernel = await kernel_packages(KERNELS[distribution("the built-in Linux")], cache)
    return [*await packages.installation(WANTED, cache), *kernel, "busybox-static"]


async def unpack(debs: Sequence[Path], work: Path) -> Path:
    """Unpack all packages into a tree with merged directories, and return the tree."""
    tree = work / "tree"
    for name in MERGED:
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    for name in ("control", "list"):
        (work / name).mkdir()
    (work / "exclude").write_text("".join(f"./{pattern}\n" for pattern in NOT_UNPACKED))
    for deb in debs:
        await process.run(["sh", "-c", UNPACK, "sh", deb], cwd=work, env={"LC_ALL": "C.UTF-8"})
    return tree


async def arrange(tree: Path, work: Path) -> None:
    """Prepare the tree for the boot that configures it; make `image/kernel` and `image/initrd`."""
    drivers = await modules(tree / "usr/lib/modules", DRIVERS)
    await in_background(_make_initrd, tree, work, drivers)
    await in_background(_make_kernel, tree, work)
    await in_background(_make_database, tree, work)
    await in_background(_add_own_files, tree, work)


def _make_initrd(tree: Path, work: Path, drivers: Sequence[Path]) -> None:
    initrd = make_initramfs(tree, GUEST / "initramfs.sh", drivers, work / "initramfs")
    (work / "image" / "initrd").write_bytes(initrd)


def _make_kernel(tree: Path, work: Path) -> None:
    kernel = find_file(tree, KERNEL_FILES)
    (work / "image" / "kernel").write_bytes(decompress_kernel(kernel.read_bytes()))
    kernel.unlink()
    shutil.rmtree(tree / "boot")
    (tree / "boot").mkdir()


# dpkg's database


def _make_database(tree: Path, work: Path) -> None:
    """Write dpkg's database as if dpkg had unpacked the packages, so that dpkg configures them.

    Leave out the kernel's packages, since QEMU loads the kernel. They depend on initramfs-tools,
    which is not there, and apt-get installs nothing while a dependency is missing.
    """
    database = tree / "var/lib/dpkg"
    (database / "info").mkdir(parents=True, exist_ok=True)
    for name in ("updates", "triggers", "parts", "alternatives"):
        (database / name).mkdir(exist_ok=True)
    (database / "info/format").write_text("1\n")
    (database / "available").touch()
    stanzas, modes = [], []
    for control in sorted((work / "control").iterdir()):
        name = control.name
        if KERNEL_PACKAGE.match(name):
            continue
        text = (control / "control").read_text().strip()
        if re.search(r"(?mi)^Multi-Arch: *same", text):
            name += ":amd64"
        entries = list(_entries((work / "list" / control.name).read_text()))
        listing = "".join(f"{path}\n" for _, _, path in entries)
        (database / "info" / f"{name}.list").write_text(listing)
        modes += [f"{mode} {owner} {path}\n" for mode, owner, path in entries if owner or mode]
        conffiles = ""
        for path in control.iterdir():
            if path.name == "conffiles":
                conffiles = _conffiles(tree, path.read_text().split())
            if path.name != "control":
                install(path, database / "info" / f"{name}.{path.name}", path.stat().st_mode)
        state = "installed" if control.name == CONFIGURED else "unpacked"
        status = text.replace("\n", f"\nStatus: install ok {state}\n", 1)
        stanzas.append(f"{status}\n{conffiles}")
    (database / "status").write_text("\n".join(stanzas))
    (tree / OWN).mkdir()
    (tree / OWN / "modes").write_text("".join(modes))


def _entries(listing: str) -> Iterator[tuple[str, str, str]]:
    """Yield mode, owner and path of each file that tar listed; empty for an ordinary mode or owner.

    Yield the mode and the owner if the mode has a special bit, or if the owner is not root. The
    guest must set both together, since a change of the owner clears the special bits.
    """
    for line in listing.splitlines():
        match = re.fullmatch(r"(\S{10}) +(\S+) +\S+ \S+ \S+ \./(.*?)( -> .*| link to .*)?", line)
        if match is None:
            continue
        permissions, owner, path = match[1], match[2], match[3].rstrip("/")
        mode = _octal(permissions) if re.search("[sStT]", permissions) else ""
        other = owner.replace("/", ":") if owner not in ("root/root", "0/0") else ""
        mode = mode or (other and _octal(permissions))
        yield mode, other or (mode and "root:root"), f"/{path or '.'}"


def _octal(permissions: str) -> str:
    """Convert `-rwxr-sr-x` to `2755`."""
    mode = 0
    for index, letter in enumerate(permissions[1:]):
        if letter not in "-ST":
            mode |= 1 << (8 - index)
        if letter in "sStT":
            mode |= {2: 0o4000, 5: 0o2000, 8: 0o1000}[index]
    return f"{mode:04o}"


def _conffiles(tree: Path, paths: Sequence[str]) -> str:
    lines = []
    for path in paths:
        file = tree / path.lstrip("/")
        if file.is_file():
            digest = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
            lines.append(f" {path} {digest}\n")
    return "Conffiles:\n" + "".join(lines) if lines else ""


# The library's own files


def _add_own_files(tree: Path, work: Path) -> None:
    install(find_file(tree, ["busybox"]), tree / OWN / "busybox", 0o755)
    for name in ("init", "configure", "end"):
        install(GUEST / f"{name}.sh", tree / OWN / name, 0o755)
    for name in ("poweroff", "halt", "reboot", "shutdown"):
        (tree / "usr/sbin" / name).symlink_to(f"/{OWN}/end")
    install(GUEST / "parked.pl", tree / OWN / "parked", 0o755)
    install(GUEST / "sshd_config", tree / OWN / "sshd_config")
    install(GUEST / "dpkg.cfg", tree / "etc/dpkg/dpkg.cfg.d/smolvm")
    (tree / "etc/resolv.conf").write_text("nameserver 10.0.2.3\n")  # QEMU's DNS server
    (tree / "etc/fstab").touch()
    (tree / "root").chmod(0o700)
    _copy_sources(tree)


def _copy_sources(tree: Path) -> None:
    """Copy the package sources of the host's own distribution to the guest, with their keyrings."""
    apt = tree / "etc/apt"
    (apt / "sources.list.d").mkdir(parents=True, exist_ok=True)
    for path in own_sources():
        text = path.read_text()
        for keyring in re.findall(r"(?i)signed-by[:=] *(/[^\s\]]+)", text):
            if not (tree / keyring.lstrip("/")).exists():
                install(Path(keyring), tree / keyring.lstrip("/"))
        install(path, apt / path.relative_to("/etc/apt"))
