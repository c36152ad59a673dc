"""The stand-in's files: which packages they come from, and where they go.

Two directories are made from the unpacked packages: `esp`, what the EFI system partition holds
(but for grub.cfg, which is a variant's own), and `root`, the guest's root.
"""

from __future__ import annotations

import asyncio
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from smolvm_async import process
from smolvm_async.errors import HostError
from smolvm_async.images import packages
from smolvm_async.shielding import in_background

GUEST_SCRIPTS = Path(__file__).parent / "guest"

SIGNED = ("shim-signed", "grub-efi-amd64-signed")
SHIMS = ("shimx64.efi.signed", "shimx64.efi.signed.latest", "shimx64.efi.dualsigned")
LOADER = "ld-linux-x86-64.so.2"
GRUBS = ("grubx64.efi.signed", "grubx64.efi.signed.latest")

DISK_DRIVERS = ("virtio_pci", "virtio_scsi", "sd_mod", "crc32c_generic", "ext4")
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
    """What a guest has: its kernel by distribution, and the drivers and scripts of its own."""

    name: str
    kernels: Mapping[str, str]
    drivers: tuple[str, ...] = ()
    scripts: tuple[str, ...] = ()


PLAIN = Flavour("plain", {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"})
DESKTOP = Flavour(  # kernels for clouds have no USB
    "desktop",
    {"debian": "linux-image-amd64", "ubuntu": "linux-image-generic"},
    drivers=("xhci_pci", "usbhid", "hid_generic", "psmouse"),
    scripts=("desktop",),
)


def release() -> list[str]:
    """This host's distribution, those it descends from, and its version."""
    try:
        fields = platform.freedesktop_os_release()
    except OSError:
        return []
    return [fields["ID"], *fields.get("ID_LIKE", "").split(), fields.get("VERSION_ID", "")]


def distribution() -> str:
    """`debian` or `ubuntu`, whichever this host is or descends from.

    Raises:
        HostError: If it is neither.
    """
    for name in release():
        if name in PLAIN.kernels and platform.machine() == "x86_64":
            return name
    raise HostError(
        "The stand-in is built from Debian's or Ubuntu's x86-64 packages and needs such a host."
    )


async def package_names(cache: Path, flavour: Flavour) -> list[str]:
    """The packages to fetch, once the lists in `cache` are there."""
    agent = await packages.dependencies(["qemu-guest-agent"], cache)
    kernel = await packages.dependencies([flavour.kernels[distribution()]], cache)
    return [
        *SIGNED,
        "busybox-static",
        "qemu-guest-agent",
        *(name for name in agent if name.startswith(("lib", "zlib"))),
        *(name for name in kernel if re.match(r"linux-(image|modules)-\d", name)),
    ]


async def arrange(unpacked: Path, work: Path, flavour: Flavour) -> None:
    """Make `esp` and `root` in `work` from the unpacked packages.

    Raises:
        HostError: If the packages do not hold what is expected of them.
    """
    esp, root = work / "esp", work / "root"
    libraries = await _libraries(unpacked)
    busybox = await asyncio.to_thread(_find, unpacked, ["busybox"])
    applets = await process.run([busybox, "--list"])
    disk_drivers = await _modules(unpacked, DISK_DRIVERS)
    all_drivers = await _modules(unpacked, [*DISK_DRIVERS, *OTHER_DRIVERS, *flavour.drivers])
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
    for name in ("bin", "dev", "etc", "lib/modules", "lib64", "proc", "run", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "sbin").symlink_to("bin")
    (root / "etc/resolv.conf").touch()
    _install(_find(unpacked, ["busybox"]), root / "bin/busybox", 0o755)
    for applet in applets:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "bin/init").unlink(missing_ok=True)  # busybox has one too
    for script in ("init", "shutdown", *scripts):
        _install(GUEST_SCRIPTS / f"{script}.sh", root / "bin" / script, 0o755)
    _install(GUEST_SCRIPTS / "network.sh", root / "etc/network.sh", 0o755)
    _install(_find(unpacked, ["qemu-ga"]), root / "bin/qemu-ga", 0o755)
    for library in libraries:
        _install(library, root / "lib" / library.name, 0o755)
    _install(_find(unpacked, [LOADER]), root / "lib64" / LOADER, 0o755)
    _install_drivers(drivers, root / "lib/modules")
    _forget_umask(root)


def _arrange_esp(unpacked: Path, esp: Path, drivers: Sequence[Path]) -> None:
    _install(_find(unpacked, SHIMS), esp / "EFI/BOOT/BOOTX64.EFI")
    _install(_find(unpacked, GRUBS), esp / "EFI/BOOT/grubx64.efi")
    _install(_find(unpacked, ["vmlinuz-*"]), esp / "vmlinuz")
    tree = esp.with_name("initramfs")
    for name in ("bin", "dev", "modules", "proc", "root", "sys"):
        (tree / name).mkdir(parents=True)
    _install(_find(unpacked, ["busybox"]), tree / "bin/busybox", 0o755)
    _install(GUEST_SCRIPTS / "initramfs.sh", tree / "init", 0o755)
    _install_drivers(drivers, tree / "modules")
    _forget_umask(tree)
    (esp / "initrd.img").write_bytes(newc(tree))


def _install(source: Path, target: Path, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _install_drivers(drivers: Sequence[Path], directory: Path) -> None:
    for driver in drivers:
        _install(driver, directory / driver.name)
    (directory / "order").write_text("".join(f"{driver.name}\n" for driver in drivers))


def _forget_umask(tree: Path) -> None:
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def _find(unpacked: Path, names: Sequence[str]) -> Path:
    """The file with the first of `names` (or patterns) that there is."""
    for name in names:
        for path in sorted(unpacked.rglob(name)):
            if path.is_file() and not path.is_symlink():
                return path
    raise HostError(f"The packages of this host's distribution hold no {' or '.join(names)}.")


async def _libraries(unpacked: Path) -> list[Path]:
    """What qemu-ga links with, by the packages' own loader; never a file of the host."""
    path = f"{unpacked}/lib/x86_64-linux-gnu:{unpacked}/usr/lib/x86_64-linux-gnu"
    loader = await asyncio.to_thread(_find, unpacked, [LOADER])
    agent = await asyncio.to_thread(_find, unpacked, ["qemu-ga"])
    listing = await process.run(
        [loader, "--inhibit-cache", "--library-path", path, "--list", agent]
    )
    found = [Path(word) for word in re.findall(r"=> (/.*) \(0x", listing)]
    libraries = [library for library in found if library.name != LOADER]
    strangers = [library for library in libraries if unpacked not in library.parents]
    if strangers or "not found" in listing:
        raise HostError(f"qemu-ga needs libraries that its packages do not hold:\n{listing}")
    return libraries


# Kernel modules


async def _modules(unpacked: Path, names: Iterable[str]) -> list[Path]:
    """The modules `names` and those they need, uncompressed, in the order to load them.

    What the kernel has built in, or this kernel does not have at all, is left out.
    """
    paths = await asyncio.to_thread(lambda: list(unpacked.rglob("*.ko*")))
    available = {_module_name(path): path for path in paths}
    order: dict[str, Path] = {}

    async def add(name: str) -> None:
        if name not in order and name in available:
            module = await _uncompressed(available[name])
            for needed in await asyncio.to_thread(_needs, module):
                await add(needed)
            order[name] = module

    for name in names:
        await add(name)
    return list(order.values())


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _needs(module: Path) -> list[str]:
    """The names in its `depends=`; the packages have no modules.dep, depmod makes it later."""
    match = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    names = match[1].decode().split(",") if match else []
    return [name.replace("-", "_") for name in names if name]


async def _uncompressed(module: Path) -> Path:
    """The module as a plain `.ko`, which is what busybox's insmod loads."""
    plain = module.with_suffix("")
    if module.suffix == ".ko":
        return module
    if not plain.exists():
        program = {".xz": "xz", ".zst": "zstd"}[module.suffix]
        await process.run([program, "--decompress", "--keep", module])
    return plain


# The initramfs


def newc(tree: Path) -> bytes:
    """The files of `tree` as a cpio archive of format `newc`: root's, sorted, of no date."""
    return b"".join(_newc_entries(tree))


def _newc_entries(tree: Path) -> Iterator[bytes]:
    for path in sorted(tree.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        yield _newc_entry(str(path.relative_to(tree)), path.stat().st_mode, data)
    yield _newc_entry("dev/console", 0o020600, b"", major=5, minor=1)  # the first program's stdio
    yield _newc_entry("TRAILER!!!", 0, b"")


def _newc_entry(name: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> bytes:
    links = 1
    fields = (0, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
