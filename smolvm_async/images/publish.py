"""A directory → a published image: what is in it, its manifest, its files, in this order backwards.

The manifest goes last: until then nobody finds the image.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from smolvm_async.config.checks import check_path, shown
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.progress import Meter, ProgressCallback
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.cache.layout import Layout, cache_root
from smolvm_async.images.local import open_image
from smolvm_async.images.manifest import Manifest, parse_manifest
from smolvm_async.images.s3.client import open_client
from smolvm_async.images.s3.errors import explain
from smolvm_async.images.s3.upload import upload
from smolvm_async.images.s3.uri import MANIFEST, Location, parse_uri
from smolvm_async.images.source import open_initrd, open_kernel

KINDS = {  # how the files of a directory without a manifest are recognized
    "rootfs": r".*\.qcow2|rootfs.*|disk.*",
    "kernel": r"vmlinu[xz].*|bzImage.*|kernel.*",
    "initrd": r"initrd.*|initramfs.*",
}
BOOT_ARGS = "boot_args"  # a file of them, such as the built-in Debian has
PIECE = 1 << 20  # bytes
LEVEL = 9  # of zstd; its window fits what readers take


class _Piece(NamedTuple):
    """A file to be uploaded.

    Attributes:
        fd: What is uploaded, open.
        described: What the manifest says of it.
    """

    fd: int
    described: dict[str, Any]


async def push_image(
    directory: str | os.PathLike[str],
    uri: str,
    *,
    name: str | None = None,
    os: str | None = None,
    memory: int | None = None,
    cpus: int | None = None,
    boot_args: str | None = None,
    compress: str | None = None,
    on_progress: ProgressCallback | None = None,
) -> Manifest:
    """Publish the image in a directory: a qcow2, and a kernel and an initramfs where it has them.

    A `smolvm-image.json` in the directory says which files these are, and everything else that is
    not given here; without one they are recognized by their names.

    Args:
        uri: Where to: `s3://BUCKET/PREFIX/`, or the manifest's own.
        name: What people call it; by default the last part of the prefix.
        os: The guest OS; by default `linux`, if there is a kernel.
        memory: MiB that it is best run with.
        cpus: Likewise, cores.
        boot_args: The kernel's command line; by default what a file `boot_args` says.
        compress: `zstd` compresses the disk.

    Returns:
        The manifest, as it was published.

    Raises:
        ConfigError: An argument is wrong, or the directory holds no image that can be used.
        HostError: There is no space for what is compressed.
        ImageError: It cannot be uploaded.
    """
    location = parse_uri(uri, "uri")
    source = check_path(directory, "directory", "a directory")
    if compress not in (None, "zstd"):
        raise ConfigError(f"compress={shown(compress)} is wrong: pass 'zstd' or None.")
    given = {
        "name": name,
        "os": os,
        "memory": memory,
        "cpus": cpus,
        "boot_args": boot_args,
    }
    meter = Meter(on_progress, "image")
    with ExitStack() as stack:
        meter.report(f"reading {source}")
        values, paths = await in_background(_survey, source, location, given)
        with Layout(cache_root()).usable() if compress else nullcontext():
            pieces = {
                part: await in_background(_prepare, stack, part, path, values, compress)
                for part, path in paths.items()
            }
        for part, piece in pieces.items():
            values[part] = piece.described
        manifest = await in_background(_manifest, values, location)
        total = sum(piece.described["size"] for piece in pieces.values())
        before = 0
        message = f"uploading {manifest.name}"
        async with open_client() as client:
            for piece in pieces.values():
                key = location.beside(piece.described["name"])
                digest = piece.described["sha256"]

                def on_bytes(sent: int, before: int = before) -> None:
                    meter.report(message, before + sent, total, copied=before + sent)

                await upload(client, location.bucket, key, piece.fd, digest, on_bytes)
                before += piece.described["size"]
            await _put_manifest(client, location, manifest)
    return manifest


def _survey(
    directory: Path, location: Location, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Path]]:
    """What the manifest says besides of the files, and the files by what they are."""
    try:
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_file())
    except OSError as error:
        raise ConfigError(
            f"directory={str(directory)!r} cannot be read: {error.strerror}; pass the path of a "
            "directory with a qcow2."
        ) from None
    if MANIFEST in names:
        old = parse_manifest((directory / MANIFEST).read_bytes(), str(directory / MANIFEST))
        values = old.model_dump(mode="json", exclude_none=True)
        paths = {part: directory / file.name for part, file in old.files.items()}
    else:
        values, paths = {}, _recognized(directory, names)
    if BOOT_ARGS in names and "kernel" in paths:
        text = (directory / BOOT_ARGS).read_bytes()[:4096].decode(errors="replace")
        values.setdefault("boot_args", text.strip())
    if "kernel" in paths:
        values.setdefault("os", "linux")
    values.setdefault("name", _default_name(location))
    values |= {field: value for field, value in given.items() if value is not None}
    if "os" not in values:
        raise ConfigError(
            f"os= is missing: a disk does not tell which operating system is inside "
            f"{str(directory)!r}; pass os='windows' or os='linux'."
        )
    return {**values, "schema_version": 1}, paths


def _default_name(location: Location) -> str:
    parts = [part for part in location.key.removesuffix(MANIFEST).split("/") if part]
    return parts[-1].removesuffix(".json") if parts else location.bucket


def _recognized(directory: Path, names: list[str]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for part, pattern in KINDS.items():
        meant = [name for name in names if re.fullmatch(pattern, name)]
        if part == "rootfs" and any(name.endswith(".qcow2") for name in meant):
            meant = [name for name in meant if name.endswith(".qcow2")]
        if len(meant) > 1:
            raise ConfigError(
                f"directory={str(directory)!r} has more than one {part}: {', '.join(meant)}; leave "
                f"one, or put a {MANIFEST} there that says which."
            )
        if meant:
            paths[part] = directory / meant[0]
    if "rootfs" not in paths:
        raise ConfigError(
            f"directory={str(directory)!r} has no disk: put a qcow2 there, called disk.qcow2."
        )
    return paths


def _prepare(
    stack: ExitStack, part: str, path: Path, values: dict[str, Any], compress: str | None
) -> _Piece:
    """Check a file, and read it once for its digest; for a thread."""
    described: dict[str, Any] = {"name": path.name}
    if part == "rootfs":
        old = values.get("rootfs", {})
        described["format"] = old.get("format", "qcow2")
        fd = stack.enter_context(open_image(path, described["format"])).fd
    else:
        fd = stack.enter_context((open_kernel if part == "kernel" else open_initrd)(path))
    if part == "rootfs" and compress is not None:
        packed = stack.enter_context(_scratch())
        described |= {"name": f"{path.name}.zst", "compression": "zstd"}
        described |= _compress(fd, packed)
        return _Piece(packed, described)
    return _Piece(fd, {**described, "sha256": _digest(fd), "size": os.fstat(fd).st_size})


@contextmanager
def _scratch() -> Iterator[int]:
    """A file without a name, so that it goes with the process."""
    layout = Layout(cache_root())
    layout.make()
    with tempfile.TemporaryFile(dir=layout.arriving) as file:
        yield file.fileno()


def _digest(fd: int) -> str:
    digest, at = hashlib.sha256(), 0
    while piece := os.pread(fd, PIECE, at):
        digest.update(piece)
        at += len(piece)
    return digest.hexdigest()


def _compress(fd: int, packed: int) -> dict[str, Any]:
    if sys.version_info >= (3, 14):
        from compression.zstd import CompressionParameter, ZstdCompressor
    else:
        from backports.zstd import CompressionParameter, ZstdCompressor
    compressor = ZstdCompressor(
        options={
            CompressionParameter.compression_level: LEVEL,
            CompressionParameter.checksum_flag: 1,
        }
    )
    plain, outside, at, size = hashlib.sha256(), hashlib.sha256(), 0, 0
    while True:
        piece = os.pread(fd, PIECE, at)
        at += len(piece)
        plain.update(piece)
        out = compressor.compress(piece) if piece else compressor.flush()
        outside.update(out)
        view = memoryview(out)
        while view:
            written = os.pwrite(packed, view, size)
            view, size = view[written:], size + written
        if not piece:
            break
    return {
        "sha256": outside.hexdigest(),
        "size": size,
        "content_sha256": plain.hexdigest(),
        "content_size": at,
    }


def _manifest(values: dict[str, Any], location: Location) -> Manifest:
    return parse_manifest(json.dumps(values).encode(), f"what would be {location.uri}")


async def _put_manifest(client: Any, location: Location, manifest: Manifest) -> None:
    content = manifest.model_dump_json(exclude_none=True, indent=1).encode()
    try:
        await client.put_object(
            Bucket=location.bucket,
            Key=location.key,
            Body=content,
            ContentType="application/json",
        )
    except Exception as error:
        raise explain(error, location.uri) from error
