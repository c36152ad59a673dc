"""Where the cache keeps what, its locks, and the records of what each URI was.

::

    sha256/DIGEST        a file by its content, read-only; under this name it is whole
    images/KEY.json      what a URI was when it was last pulled
    arriving/DIGEST.*    what has yet to be whole: a part, its journal, its lock
    data-dirs/KEY        where VMs are that were made from images of this cache
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from smolvm_async.config.checks import check_path
from smolvm_async.errors import HostError
from smolvm_async.foundation.files import replace_file
from smolvm_async.foundation.locking import LockFile
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.images.manifest import ImageFile, Manifest

logger = get_logger(__name__)

VARIABLE = "SMOLVM_IMAGE_DIR"
MTIME = 1_000_000_000  # seconds since the epoch; whoever writes to a kept file changes it


class Published(NamedTuple):
    """An image as its manifest describes it.

    Attributes:
        uri: Of the manifest.
        endpoint: Of the store, if it is not AWS.
        manifest: What it says.
    """

    uri: str
    endpoint: str
    manifest: Manifest


class Pulled(NamedTuple):
    """The record of an image.

    Attributes:
        path: Of the record.
        published: What the URI was.
        pulled: When, in seconds since the epoch.
        used: When it was last pulled or booted.
    """

    path: Path
    published: Published
    pulled: float
    used: float


def cache_root(data_dir: object = None) -> Path:
    """The cache's directory: what was given, else `$SMOLVM_IMAGE_DIR`, else below XDG's.

    Raises:
        ConfigError: If it is no path.
    """
    if data_dir is None and (named := os.environ.get(VARIABLE)):
        return check_path(named, VARIABLE, "a directory")
    if data_dir is None:
        return xdg_home("XDG_CACHE_HOME", ".cache") / "smolvm-async" / "images"
    return check_path(data_dir, "data_dir", "a directory")


class Layout:
    """The directories of a cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = root / "sha256"
        self.images = root / "images"
        self.arriving = root / "arriving"
        self.data_dirs = root / "data-dirs"

    def make(self) -> None:
        """Make what is missing of them.

        Raises:
            HostError: If that cannot be done, or other users could plant images in it.
        """
        try:
            for directory in (self.root, self.files, self.images, self.arriving, self.data_dirs):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.root.stat()
        except OSError as error:
            raise HostError(
                f"The image cache {str(self.root)!r} cannot be used: {error.strerror}. Set "
                f"{VARIABLE} to a directory that this user can write to."
            ) from error
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
            raise HostError(
                f"The image cache {str(self.root)!r} can be written to by other users: set "
                f"{VARIABLE} to a directory of this user's own, or run: chmod go-w "
                f"{str(self.root)!r}"
            )

    @contextlib.contextmanager
    def usable(self) -> Iterator[None]:
        """Explain what the disk refuses in the block.

        Raises:
            HostError: If it refuses something.
        """
        try:
            yield
        except OSError as error:
            raise HostError(
                f"The image cache {str(self.root)!r} cannot be used: {error.strerror or error}. "
                f"Free some space (smolvm-async image prune), or set {VARIABLE} to a directory "
                "that this user can write to."
            ) from error

    def path_of(self, file: ImageFile) -> Path:
        """Where a file is, once it is there."""
        return self.files / file.digest

    def holds(self, file: ImageFile) -> bool:
        """Whether a file is there and as it was left: its kind, size and time, not its content."""
        try:
            status = self.path_of(file).lstat()
        except OSError:
            return False
        as_left = stat.S_ISREG(status.st_mode) and status.st_mtime_ns == MTIME * 10**9
        return as_left and file.cached_size in (None, status.st_size)

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Alone with the cache, for a moment."""
        async with LockFile(self.root / "lock").hold():
            yield

    def record_path(self, uri: str, endpoint: str) -> Path:
        """Where the record of a URI is."""
        return self.images / f"{key_of(endpoint, uri)}.json"

    def write_record(self, published: Published, path: Path) -> None:
        """Note what a URI is."""
        values = {
            "uri": published.uri,
            "endpoint": published.endpoint,
            "pulled": time.time(),
            "manifest": published.manifest.model_dump(mode="json", exclude_none=True),
        }
        replace_file(path, json.dumps(values, indent=1).encode())

    def read_record(self, path: Path) -> Pulled | None:
        """A record; `None` if there is none that can be read."""
        try:
            values: Any = json.loads(path.read_bytes())
            manifest = Manifest.model_validate(values["manifest"])
            published = Published(str(values["uri"]), str(values["endpoint"]), manifest)
            return Pulled(path, published, float(values["pulled"]), path.stat().st_mtime)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            logger.warning("the record %s cannot be read: %s", path, error)
            return None

    def records(self) -> Iterator[Pulled]:
        """All records, the most recently used first."""
        found = [self.read_record(path) for path in self.images.glob("*.json")]
        yield from sorted((one for one in found if one is not None), key=lambda one: -one.used)

    def note_data_dir(self, data_dir: Path) -> None:
        """Note where a VM is that is made from an image of this cache."""
        path = self.data_dirs / key_of(str(data_dir))
        if not path.exists():
            replace_file(path, os.fsencode(data_dir))

    def known_data_dirs(self) -> Iterator[Path]:
        """Where VMs are, or were."""
        for path in self.data_dirs.iterdir() if self.data_dirs.is_dir() else ():
            directory = Path(os.fsdecode(path.read_bytes()))
            if directory.is_dir():
                yield directory
            else:
                path.unlink(missing_ok=True)


def key_of(*parts: str) -> str:
    """A file name that stands for texts."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]
