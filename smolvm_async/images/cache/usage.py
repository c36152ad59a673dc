"""Which VMs need a file of the cache: those that run hold a lock on it, kept ones have a record."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from smolvm_async.foundation.locking import try_lock
from smolvm_async.images.cache.layout import Layout
from smolvm_async.state.record import ACTIVE, Record
from smolvm_async.state.registry import survey


class Use(NamedTuple):
    """A VM that needs files of the cache.

    Attributes:
        vm_id: Its id.
        paths: The files.
        uri: Of the image that it was made from.
    """

    vm_id: str
    paths: frozenset[Path]
    uri: str


def uses(layout: Layout) -> list[Use]:
    """The VMs that need files of the cache, as far as their data directories are known."""
    found = []
    for data_dir in layout.known_data_dirs():
        for record, held in survey(data_dir):
            running = held and record.status in ACTIVE
            if running or record.machine is not None:
                uri = record.config.image if running else ""
                found.append(Use(record.config.vm_id, frozenset(_sources(record)), uri))
    return found


def _sources(record: Record) -> Iterator[Path]:
    if record.machine is not None and record.machine.source is not None:
        source = record.machine.source
        yield from (path for path in (source.image, source.kernel, source.initrd) if path)


def users_of(paths: set[Path], uri: str, found: list[Use]) -> list[str]:
    """The ids of VMs that need one of the files, or run from the URI."""
    return sorted({use.vm_id for use in found if use.paths & paths or use.uri == uri})


def is_held(path: Path) -> bool:
    """Whether QEMU, or a VM that is just starting, holds a lock on the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    with contextlib.closing(os.fdopen(fd, "rb")):
        return not try_lock(fd)
