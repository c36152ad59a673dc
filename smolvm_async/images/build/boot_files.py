"""Boot files of the Linux guests that the library builds: kernel, modules, initramfs."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from smolvm_async.errors import HostError
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build import packages
from smolvm_async.images.build.decompression import decompress

ELF = b"\x7fELF"

# The kernel is in /boot, or from Linux 7.0 on in /usr/lib/modules/VERSION.
KERNEL_FILES = ("vmlinuz-*", "vmlinuz")

# Debian had the whole kernel in linux-image, and from Linux 7.0 on has it in four packages.
KERNEL_PACKAGE = re.compile(r"linux-(image|binary|modules|base)-\d")


async def kernel_packages(kernel: str, cache: Path) -> list[str]:
    """Return the packages with the files of a kernel, without the programs that they depend on.

    Args:
        kernel: A package that depends on the newest kernel, such as `linux-image-amd64`.
        cache: The directory with the package lists.
    """
    return list(filter(KERNEL_PACKAGE.match, await packages.dependencies([kernel], cache)))


def install(source: Path, target: Path, mode: int = 0o644) -> None:
    """Copy a file, and create its parent directories."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def install_drivers(drivers: Sequence[Path], directory: Path) -> None:
    """Copy modules, and list their names in a file `order`, in the order in which to load them."""
    for driver in drivers:
        install(driver, directory / driver.name)
    (directory / "order").write_text("".join(f"{driver.name}\n" for driver in drivers))


def reset_modes(tree: Path) -> None:
    """Set the modes of a tree to 755 and 644, so that the builder's umask does not matter."""
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def find_file(unpacked: Path, names: Sequence[str]) -> Path:
    """Return the first file that matches one of `names` (names or patterns, tried in order)."""
    for name in names:
        for path in sorted(unpacked.rglob(name)):
            if path.is_file() and not path.is_symlink():
                return path
    raise HostError(
        f"None of the downloaded packages contains {' or '.join(names)}.",
        hint="Check that the package sources and pins in /etc/apt are those of this host's "
        "release: apt-cache policy shows them.",
        missing=tuple(names),
    )


async def modules(unpacked: Path, names: Iterable[str]) -> list[Path]:
    """Return the modules `names` and their dependencies, uncompressed, in the order to load them.

    Leave out modules that are built into this kernel, or do not exist in it.
    """
    return await in_background(_modules, unpacked, names)


def _modules(unpacked: Path, names: Iterable[str]) -> list[Path]:
    paths = unpacked.rglob("*.ko*")
    available = {path.name.partition(".")[0].replace("-", "_"): path for path in paths}
    order: dict[str, Path] = {}

    def add(name: str) -> None:
        if name not in order and name in available:
            module = _uncompressed(available[name])
            for needed in _needs(module):
                add(needed)
            order[name] = module

    for name in names:
        add(name)
    return list(order.values())


def _needs(module: Path) -> list[str]:
    """Return the names in the module's `depends=`, since the packages contain no modules.dep."""
    match = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    names = match[1].decode().split(",") if match else []
    return [name.replace("-", "_") for name in names if name]


def _uncompressed(module: Path) -> Path:
    """Return the module as a plain `.ko` file, since busybox's insmod cannot decompress it."""
    if module.suffix == ".ko":
        return module
    plain = module.with_suffix("")
    if not plain.exists():
        content = decompress(module.read_bytes())
        if not content.startswith(ELF):
            raise HostError(f"The kernel module {module.name} has an unknown compression.")
        plain.write_bytes(content)
    return plain


def decompress_kernel(bzimage: bytes) -> bytes:
    """Return the vmlinux in a bzImage (Documentation/arch/x86/boot.rst), else `bzimage` itself.

    A vmlinux boots fastest, since QEMU starts it by its PVH note. Under TCG, the guest would take
    half a second to decompress a bzImage at each boot.
    """
    if bzimage[0x202:0x206] != b"HdrS":
        return bzimage
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    begin = (setup_sectors + 1) * 512 + offset
    vmlinux = decompress(bzimage[begin : begin + length])
    return vmlinux if vmlinux.startswith(ELF) else bzimage


def make_initramfs(unpacked: Path, init: Path, drivers: Sequence[Path], tree: Path) -> bytes:
    """Return an initramfs with busybox, the script `init` and drivers; arrange it in `tree`.

    The result is a cpio archive of format `newc`: owned by root, sorted, without dates.
    """
    for name in ("bin", "dev", "modules", "proc", "root", "sys"):
        (tree / name).mkdir(parents=True)
    install(find_file(unpacked, ["busybox"]), tree / "bin/busybox", 0o755)
    install(init, tree / "init", 0o755)
    install_drivers(drivers, tree / "modules")
    reset_modes(tree)
    return b"".join(_cpio_entries(tree))


def _cpio_entries(tree: Path) -> Iterator[bytes]:
    for path in sorted(tree.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        yield _cpio_entry(str(path.relative_to(tree)), path.stat().st_mode, data)
    # The kernel opens this device as stdin, stdout and stderr of /init.
    yield _cpio_entry("dev/console", 0o020600, b"", major=5, minor=1)
    yield _cpio_entry("TRAILER!!!", 0, b"")


def _cpio_entry(name: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> bytes:
    links = 1
    fields = (0, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
