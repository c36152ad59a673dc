"""Publish a directory as an image.

The manifest is uploaded last, so nobody finds a half-uploaded image.
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
from typing import Any

from smolvm_async.config.checks import check_path, shown
from smolvm_async.config.uri import MANIFEST, Location, parse_uri
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.files import sha256_of
from smolvm_async.foundation.progress import Meter, ProgressCallback
from smolvm_async.foundation.tasks import in_background
from smolvm_async.guests import CHOICES
from smolvm_async.images.cache.layout import Layout, cache_root
from smolvm_async.images.local import open_image, open_initrd, open_kernel
from smolvm_async.images.manifest import Manifest, parse_manifest
from smolvm_async.images.s3.client import open_client
from smolvm_async.images.s3.errors import explain
from smolvm_async.images.s3.upload import upload

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PATTERNS = {  # patterns of file names, for a directory without a manifest
    "rootfs": r".*\.qcow2|rootfs.*|disk.*",
    "kernel": r"vmlinu[xz].*|bzImage.*|kernel.*",
    "initrd": r"initrd.*|initramfs.*",
}
BOOT_ARGS = "boot_args"  # the file with the kernel's command line; the built-in Debian has it, too
PIECE = 1 << 20  # bytes
LEVEL = 9  # zstd's level; its window fits into the 8 MiB that downloads accept


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
    """Publish the image in a directory: a qcow2, optionally with a kernel and an initramfs.

    If the directory has a `smolvm-image.json`, it names these files, and supplies the values that
    are not passed here. Otherwise, the files are recognized by their names.

    Args:
        uri: `s3://BUCKET/PREFIX/`, or the URI of the manifest itself.
        name: The image's name; by default the last part of the prefix.
        os: The guest OS; by default `linux` if the directory has a kernel.
        memory: Recommended memory in MiB.
        cpus: Recommended number of cores.
        boot_args: The kernel's command line; by default the content of the file `boot_args`.
        compress: Pass `zstd` to compress the disk.
        on_progress: Called with the bytes so far, their total, and the rate.

    Returns:
        The published manifest.

    Raises:
        ConfigError: An argument is wrong, or the directory contains no usable image.
        HostError: The cache's disk has no space for the compressed disk.
        ImageError: The upload failed.
    """
    location = parse_uri(uri, "uri")
    source = check_path(directory, "directory", "a directory")
    if compress not in (None, "zstd"):
        raise ConfigError(f"compress={shown(compress)} is wrong: pass 'zstd' or None.")
    given = {"name": name, "os": os, "memory": memory, "cpus": cpus, "boot_args": boot_args}
    meter = Meter(on_progress, "image")
    with ExitStack() as stack:
        meter.report(f"reading {source}")
        values, paths = await in_background(_read_directory, source, location, given)
        with Layout(cache_root()).opened() if compress else nullcontext():
            uploads = {
                part: await in_background(_prepare, stack, part, path, values, compress)
                for part, path in paths.items()
            }
        for part, (_, entry) in uploads.items():
            values[part] = entry
        content, where = json.dumps(values).encode(), f"the new manifest {location.uri}"
        manifest = await in_background(parse_manifest, content, where)
        total = sum(entry["size"] for _, entry in uploads.values())
        before = 0
        message = f"uploading {manifest.name}"
        async with open_client() as client:
            for fd, entry in uploads.values():
                place = location.beside(entry["name"])

                def on_bytes(sent: int, before: int = before) -> None:
                    meter.report(message, before + sent, total, copied=before + sent)

                await upload(client, place, fd, entry["sha256"], on_bytes)
                before += entry["size"]
            await _put_manifest(client, location, manifest)
    return manifest


def _read_directory(
    directory: Path, location: Location, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the manifest's values except the files, and the paths of the files by part."""
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
            "os= is missing: the library cannot see which operating system is on the disk in "
            f"{str(directory)!r}; pass {CHOICES}."
        )
    return {**values, "schema_version": 1}, paths


def _default_name(location: Location) -> str:
    parts = [part for part in location.key.removesuffix(MANIFEST).split("/") if part]
    return parts[-1].removesuffix(".json") if parts else location.bucket


def _recognized(directory: Path, names: list[str]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for part, pattern in PATTERNS.items():
        matches = [name for name in names if re.fullmatch(pattern, name)]
        if part == "rootfs" and any(name.endswith(".qcow2") for name in matches):
            matches = [name for name in matches if name.endswith(".qcow2")]
        if len(matches) > 1:
            raise ConfigError(
                f"directory={str(directory)!r} has more than one {part}: {', '.join(matches)}; "
                f"remove all but one, or add a {MANIFEST} that names the right one."
            )
        if matches:
            paths[part] = directory / matches[0]
    if "rootfs" not in paths:
        raise ConfigError(
            f"directory={str(directory)!r} has no disk: put a qcow2 called disk.qcow2 there."
        )
    return paths


def _prepare(
    stack: ExitStack, part: str, path: Path, values: dict[str, Any], compress: str | None
) -> tuple[int, dict[str, Any]]:
    """Check a file, and compress it if it is the disk and `compress` is set.

    Returns:
        The open file to upload, and its entry in the manifest.
    """
    entry: dict[str, Any] = {"name": path.name}
    if part == "rootfs":
        old = values.get("rootfs", {})
        entry["format"] = old.get("format", "qcow2")
        fd = stack.enter_context(open_image(path, entry["format"])).fd
    else:
        fd = stack.enter_context((open_kernel if part == "kernel" else open_initrd)(path))
    if part == "rootfs" and compress is not None:
        packed = stack.enter_context(_temporary_file())
        entry |= {"name": f"{path.name}.zst", "compression": "zstd"}
        entry |= _compress(fd, packed)
        return packed, entry
    return fd, {**entry, "sha256": sha256_of(fd), "size": os.fstat(fd).st_size}


@contextmanager
def _temporary_file() -> Iterator[int]:
    """Open a file without a name; the kernel deletes it when the process ends."""
    with tempfile.TemporaryFile(dir=Layout(cache_root()).arriving) as file:
        yield file.fileno()


def _compress(fd: int, packed: int) -> dict[str, Any]:
    parameters = zstd.CompressionParameter
    options: dict[int, int] = {parameters.compression_level: LEVEL, parameters.checksum_flag: 1}
    compressor = zstd.ZstdCompressor(options=options)
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
