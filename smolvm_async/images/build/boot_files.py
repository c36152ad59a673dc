"""Boot files of the Linux guests that the library builds: kernel, modules, initramfs."""

from __future__ import annotations

import asyncio
import lzma
import re
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from smolvm_async.errors import HostError
from smolvm_async.foundation import process

ELF = b"\x7fELF"


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
        missing=tuple(names),
    )


async def modules(unpacked: Path, names: Iterable[str]) -> list[Path]:
    """Return the modules `names` and their dependencies, uncompressed, in the order to load them.

    Leave out modules that are built into this kernel, or do not exist in it.
    """
    paths = await asyncio.to_thread(lambda: list(unpacked.rglob("*.ko*")))
    available = {path.name.partition(".")[0].replace("-", "_"): path for path in paths}
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


def _needs(module: Path) -> list[str]:
    """Return the names in the module's `depends=`, since the packages contain no modules.dep."""
    match = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    names = match[1].decode().split(",") if match else []
    return [name.replace("-", "_") for name in names if name]


async def _uncompressed(module: Path) -> Path:
    """Return the module as a plain `.ko` file, since busybox's insmod cannot decompress it."""
    plain = module.with_suffix("")
    if module.suffix == ".ko":
        return module
    if not plain.exists():
        program = {".xz": "xz", ".zst": "zstd"}[module.suffix]
        await process.run([program, "--decompress", "--keep", module])
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
    payload = bzimage[begin : begin + length]
    try:
        vmlinux = _decompress(payload)
    except (lzma.LZMAError, zlib.error):
        return bzimage
    return vmlinux if vmlinux.startswith(ELF) else bzimage


def _decompress(payload: bytes) -> bytes:
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(payload)
    return b""  # the standard library lacks zstd and lz4, so the guest decompresses the kernel


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
