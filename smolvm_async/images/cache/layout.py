"""The cache's directories and files, its locks, and its records of images.

::

    lock                 a process locks this file for a moment to change the cache
    sha256/DIGEST        a complete, verified, read-only file, named by its SHA-256
    images/KEY.json      a record: a URI, its manifest at the last pull, and the time
    images/KEY.*.pulling a temporary record, while files of the image are missing
    arriving/DIGEST.*    a download: the partial file, its journal, its lock
    data-dirs/KEY.HOST   the path of a data directory with VMs made from images of this cache
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple

from smolvm_async.config.checks import check_path
from smolvm_async.errors import HostError
from smolvm_async.foundation.files import make_private, replace_file
from smolvm_async.foundation.locking import LockFile
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.host.identity import this_host
from smolvm_async.images.manifest import ImageFile, Manifest

logger = get_logger(__name__)

VARIABLE = "SMOLVM_IMAGE_DIR"
MTIME = 1_000_000_000  # seconds since the epoch; a cached file with another mtime was changed
FORGOTTEN = 30 * 86_400.0  # seconds after which a note of another host's data directory is removed


class Published(NamedTuple):
    """A published image."""

    uri: str  # the URI of the manifest
    endpoint: str  # the URL of the S3 server; empty for AWS
    manifest: Manifest


class ImageRecord(NamedTuple):
    """The record of an image that was pulled. Times are in seconds since the epoch."""

    path: Path  # the record's file
    published: Published  # its state at the last pull
    pulled: float
    used: float  # the last pull or boot: the mtime of the record's file


def cache_root(data_dir: object = None) -> Path:
    """Return the cache's directory: `data_dir`, else `$SMOLVM_IMAGE_DIR`, else in XDG's cache."""
    if data_dir is None and (named := os.environ.get(VARIABLE)):
        return check_path(named, VARIABLE, "a directory")
    if data_dir is None:
        return xdg_home("XDG_CACHE_HOME", ".cache", "data_dir=") / "smolvm-async" / "images"
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
        """Create the missing directories; raise if other users can write to the cache."""
        for directory in (self.root, self.files, self.images, self.arriving, self.data_dirs):
            make_private(directory)
        status = self.root.stat()
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
            raise HostError(
                f"Other users can write to the image cache {str(self.root)!r}.",
                hint=f"Run: chmod go-w {str(self.root)!r}; or set {VARIABLE} to a directory that "
                "belongs to this user.",
            )

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Create the missing directories; turn an `OSError` of the block into a `HostError`."""
        with self.explained():
            self.make()
            yield

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an `OSError` of the block into a `HostError`."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            space = "Free some space (smolvm-async image prune), or s" if full else "S"
            raise HostError(
                f"The image cache {str(self.root)!r} cannot be used: {error.strerror or error}.",
                hint=f"{space}et {VARIABLE} to a directory that this user can write to.",
                missing=("disk space",) if full else (),
            ) from error

    def path_of(self, file: ImageFile) -> Path:
        """Return the path that a file has in the cache, even if the file is missing."""
        return self.files / file.digest

    def holds(self, file: ImageFile) -> bool:
        """Return whether a file is in the cache with unchanged kind, size and time."""
        try:
            status = self.path_of(file).lstat()
        except OSError:
            return False
        unchanged = stat.S_ISREG(status.st_mode) and status.st_mtime_ns == MTIME * 10**9
        return unchanged and file.cached_size in (None, status.st_size)

    def locked(self) -> AbstractAsyncContextManager[None]:
        """Hold the cache's lock during the block. Keep the block short."""
        return LockFile(self.root / "lock").hold()

    def record_path(self, uri: str, endpoint: str) -> Path:
        """Return the path of a URI's record."""
        return self.images / f"{key_of(endpoint, uri)}.json"

    def write_record(self, published: Published, path: Path) -> None:
        """Write the record of an image."""
        values = {
            "uri": published.uri,
            "endpoint": published.endpoint,
            "pulled": time.time(),
            "manifest": published.manifest.model_dump(mode="json", exclude_none=True),
        }
        replace_file(path, json.dumps(values, indent=1).encode())

    def read_record(self, path: Path) -> ImageRecord | None:
        """Return a record; `None` if it is missing or cannot be read."""
        try:
            values: Any = json.loads(path.read_bytes())
            manifest = Manifest.model_validate(values["manifest"])
            published = Published(str(values["uri"]), str(values["endpoint"]), manifest)
            return ImageRecord(path, published, float(values["pulled"]), path.stat().st_mtime)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            logger.warning("the record %s cannot be read: %s", path, error)
            return None

    def records(self) -> Iterator[ImageRecord]:
        """Yield all records, the most recently used first."""
        found = [self.read_record(path) for path in self.images.glob("*.json")]
        yield from sorted((record for record in found if record), key=lambda record: -record.used)

    def note_data_dir(self, data_dir: Path) -> None:
        """Remember the data directory of a VM that is made from an image of this cache."""
        path = self.data_dirs / f"{key_of(str(data_dir))}.{this_host().key}"
        if path.exists():
            os.utime(path)
        else:
            replace_file(path, os.fsencode(data_dir))

    def known_data_dirs(self) -> Iterator[Path]:
        """Yield the existing data directories that have, or had, VMs made from this cache.

        Hosts may share the cache: a directory that this host does not have may exist on its own.
        """
        suffixes = ("", f".{this_host().key}")  # earlier versions wrote no suffix
        for path in self.data_dirs.iterdir() if self.data_dirs.is_dir() else ():
            directory = Path(os.fsdecode(path.read_bytes()))
            if directory.is_dir():
                yield directory
            elif path.suffix in suffixes or time.time() - path.stat().st_mtime > FORGOTTEN:
                path.unlink(missing_ok=True)


def key_of(*parts: str) -> str:
    """Return a hash of these texts, to use as a file name."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]
