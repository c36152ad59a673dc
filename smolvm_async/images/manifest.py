"""The manifest of a published image, `smolvm-image.json`.

An attacker may have written the manifest, so every field is checked. A `Manifest` is read from one
of two schemas: the library's own schema, or that of the synchronous `smolvm` package, which has no
`schema_version`, and describes only Linux images.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smolvm_async.config.checks import MAX_CPUS, MAX_MEMORY, shown
from smolvm_async.config.uri import MANIFEST
from smolvm_async.errors import ImageError
from smolvm_async.foundation.log import get_logger
from smolvm_async.guests import GUESTS

logger = get_logger(__name__)

SCHEMA_VERSION = 1
MAX_MANIFEST = 1 << 20  # bytes
MAX_NAME, MAX_UNKNOWN = 200, 20  # characters of a name; unknown fields in a warning
LARGEST = {"rootfs": 1 << 40, "kernel": 256 << 20, "initrd": 1 << 30}  # bytes

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=LARGEST["rootfs"])]


class _StrictModel(BaseModel):
    """A frozen model without type coercion."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class ImageFile(_StrictModel):
    """One file of an image.

    Attributes:
        name: Path relative to the manifest, with `/` between its parts.
        sha256: SHA-256 of the published file, in lower-case hexadecimal.
        size: Bytes of the published file; `None` in manifests of the synchronous package.
        format: `qcow2` or `raw`, for a disk; `None` if the file's first bytes decide.
        compression: `zstd` if the file is decompressed during the download.
        content_sha256: SHA-256 of the decompressed file.
        content_size: Bytes of the decompressed file.
    """

    name: str
    sha256: Digest
    size: Size | None = None
    format: Literal["qcow2", "raw"] | None = None
    compression: Literal["zstd"] | None = None
    content_sha256: Digest | None = None
    content_size: Size | None = None

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the file in the cache, which is always decompressed."""
        return self.content_sha256 or self.sha256

    @property
    def cached_size(self) -> int | None:
        """Return the file's size in the cache, in bytes; `None` if the manifest does not say."""
        return self.content_size or self.size

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_name(self.name)
        given = (self.content_sha256 is not None, self.content_size is not None)
        if self.compression is None and any(given):
            raise ValueError("content_sha256 and content_size need a compression: add compression")
        if self.compression is not None and not all(given):
            raise ValueError("compression needs content_sha256 and content_size: add them")
        return self


class Manifest(_StrictModel):
    """The manifest of a published image.

    Attributes:
        name: The image's name, shown to users.
        os: The guest OS: a name in `GUESTS`.
        rootfs: The disk.
        kernel: The kernel that QEMU loads, for a guest without a boot loader.
        initrd: The initramfs that QEMU loads with the kernel.
        boot_args: The kernel's command line; `None` means this library's default.
        memory: Recommended memory in MiB; `None` means the guest OS's default.
        cpus: Recommended number of cores; `None` means the guest OS's default.
    """

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    os: str
    rootfs: ImageFile
    kernel: ImageFile | None = None
    initrd: ImageFile | None = None
    boot_args: Annotated[str, Field(max_length=2047)] | None = None
    memory: Annotated[int, Field(ge=1, le=MAX_MEMORY)] | None = None
    cpus: Annotated[int, Field(ge=1, le=MAX_CPUS)] | None = None

    @property
    def files(self) -> dict[str, ImageFile]:
        """Return the files by part: `kernel`, `initrd`, `rootfs`; the largest comes last."""
        parts = {"kernel": self.kernel, "initrd": self.initrd, "rootfs": self.rootfs}
        return {part: file for part, file in parts.items() if file is not None}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.name.isprintable():
            raise ValueError("name has characters that cannot be shown: use printable ones")
        if self.os not in GUESTS:
            raise ValueError(f"os must be one of {', '.join(GUESTS)}")
        if self.kernel is None and (self.initrd is not None or self.boot_args is not None):
            raise ValueError("initrd and boot_args need a kernel: add a kernel, or remove them")
        if self.kernel is not None and "kernel" not in GUESTS[self.os].features:
            raise ValueError(
                f"an image of {self.os} must not have a kernel: its own boot loader starts it"
            )
        if self.boot_args is not None and not self.boot_args.isprintable():
            raise ValueError("boot_args has characters that cannot be printed: use printable ones")
        _check_files(self.files)
        return self


def _check_name(name: str) -> None:
    parts = name.split("/")
    if (
        len(name) > MAX_NAME
        or not name.isprintable()
        or "\\" in name
        or re.match("[A-Za-z]:", name)
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise ValueError(
            f"the file name {shown(name)} is not relative to the manifest: use at most {MAX_NAME} "
            "printable characters, without '..', '\\', or a '/' at either end"
        )
    if parts[-1] == MANIFEST:
        raise ValueError(f"a file has the manifest's name, {MANIFEST}: rename the file")


def _check_files(files: Mapping[str, ImageFile]) -> None:
    names = [file.name for file in files.values()]
    if len(set(names)) < len(names):
        raise ValueError("two files have the same name: rename one")
    for part, file in files.items():
        if max(file.size or 0, file.content_size or 0) > LARGEST[part]:
            raise ValueError(f"{part} is larger than {LARGEST[part]} bytes: publish a smaller file")
        if part != "rootfs" and file.format is not None:
            raise ValueError(
                f"{part} has a format, but only rootfs may have one: remove the format"
            )
        if file.size is None and file.compression is not None:
            raise ValueError(f"{part} has no size: add its size in bytes")


def _unknown(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the fields that this version of the library does not know."""
    yield from (name for name in values if name not in Manifest.model_fields)
    for part in LARGEST:
        if isinstance(inner := values.get(part), dict):
            yield from (f"{part}.{name}" for name in inner if name not in ImageFile.model_fields)


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Parse a manifest; log a warning about unknown fields.

    Args:
        where: The manifest's URI or path, for messages.
    """
    try:
        if len(content) > MAX_MANIFEST:
            raise ValueError(f"it has more than {MAX_MANIFEST} bytes")
        values = json.loads(
            content.decode(),
            object_pairs_hook=_unique,
            parse_constant=_finite,
            parse_float=_finite,
        )
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        version = values.get("schema_version", SCHEMA_VERSION)
        if type(version) is not int:
            raise ValueError(f"its schema_version {shown(version)} is not an integer")
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"its schema_version {shown(version)} needs a newer version of the library: "
                "update smolvm_async"
            )
        own = "schema_version" in values
        values = values if own else _from_synchronous(values)
        manifest = Manifest.model_validate(values)
        if own:
            _check_own(manifest)
    except ValidationError as error:
        reason = "; ".join(_complaints(error))
    except RecursionError:
        reason = "it is nested too deeply"
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = _not_json(content, error)
    except ValueError as error:
        reason = str(error)[: MAX_NAME * 3]
    else:
        if unknown := [shown(name) for name in islice(_unknown(values), MAX_UNKNOWN)]:
            logger.warning(
                "%s has unknown fields, which are ignored: %s", where, ", ".join(unknown)
            )
        return manifest
    raise ImageError(f"{where} is not a valid manifest: {reason}.")


def _not_json(content: bytes, error: ValueError) -> str:
    from smolvm_async.images.kinds import words  # rare

    if not content.lstrip().startswith(b"{") and (kind := words(content)):
        return f"it is {kind}"
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it has the field {shown(name)} twice")
        values[name] = value
    return values


def _finite(text: str) -> float:
    """Return the number; raise if it is infinite, since Python accepts `Infinity` and `1e999`."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it has the number {shown(text)}, which JSON does not allow")
    return number


def _from_synchronous(values: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(values.get("rootfs"), str):
        raise ValueError(
            "it has no schema_version, and its rootfs is not a file name as in a manifest of the "
            "synchronous smolvm package: add schema_version"
        )
    values = dict(values)
    converted: dict[str, Any] = {"os": "linux"}
    for part in LARGEST:
        name, digest = values.pop(part, None), values.pop(f"{part}_sha256", None)
        if name is None:
            continue
        if digest is None:
            raise ValueError(
                f"it has no {part}_sha256, so the file cannot be verified: publish the image "
                "again, with smolvm-async image push"
            )
        if isinstance(name, str):
            _check_name(name)
            name = PurePosixPath(name).name  # the synchronous package does the same
        converted[part] = {"name": name, "sha256": digest}
    if "kernel" not in converted:
        raise ValueError(
            "it has no kernel, but a manifest of the synchronous smolvm package must have one: add "
            "a kernel"
        )
    return {**values, **converted}


def _check_own(manifest: Manifest) -> None:
    """Check the fields that this library's own schema requires."""
    for part, file in manifest.files.items():
        if file.size is None:
            raise ValueError(f"{part} has no size: add its size in bytes")
    if manifest.rootfs.format is None:
        raise ValueError("rootfs has no format: add qcow2 or raw")


def _complaints(error: ValidationError) -> Iterator[str]:
    for complaint in error.errors()[:3]:
        where = ".".join(str(part) for part in complaint["loc"])[:MAX_NAME]
        message = complaint["msg"].removeprefix("Value error, ")
        yield f"{where}: {message}" if where else message
