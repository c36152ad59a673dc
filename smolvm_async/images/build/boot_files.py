"""What a Linux guest that is built here boots with: files of packages, modules, an initramfs."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from smolvm_async.errors import HostError
from smolvm_async.foundation import process


def install(source: Path, target: Path, mode: int = 0o644) -> None:
    """Copy a file, with the directories above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def install_drivers(drivers: Sequence[Path], directory: Path) -> None:
    """Copy modules, and in which `order` to load them."""
    for driver in drivers:
        install(driver, directory / driver.name)
    (directory / "order").write_text("".join(f"{driver.name}\n" for driver in drivers))


def forget_umask(tree: Path) -> None:
    """Give what is in a tree the usual modes."""
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def find_file(unpacked: Path, names: Sequence[str]) -> Path:
    """The file with the first of `names` (or patterns) that there is."""
    for name in names:
        for path in sorted(unpacked.rglob(name)):
            if path.is_file() and not path.is_symlink():
                return path
    raise HostError(f"The packages of this host's distribution hold no {' or '.join(names)}.")


async def modules(unpacked: Path, names: Iterable[str]) -> list[Path]:
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
