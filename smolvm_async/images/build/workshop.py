"""Where an image is made: a directory for the one build that is going on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from smolvm_async.errors import HostError
from smolvm_async.foundation.tasks import in_background

# By distribution: kernels with drivers for virtual machines alone.
CLOUD_KERNELS = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}

# In place of the host's /etc/mke2fs.conf, which differs from release to release.
MKE2FS_CONF = """\
[defaults]
blocksize = 4096
inode_size = 256
base_features = sparse_super,large_file,filetype,dir_index
[fs_types]
ext4 = {
    features = has_journal,extent,extra_isize,metadata_csum
}
"""


@asynccontextmanager
async def workshop(store: Path) -> AsyncIterator[Path]:
    """A directory in `store`, which the caller has locked, for as long as the block lasts."""
    work = store / "building"
    if work.exists():  # its builder was killed, or we would not hold the lock
        await in_background(shutil.rmtree, work)
    work.mkdir()
    try:
        yield work
    finally:
        await in_background(shutil.rmtree, work)


def key_of(*parts: object) -> str:
    """A name that changes with what it is made of."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def release() -> list[str]:
    """This host's distribution, those it descends from, and its version."""
    try:
        fields = platform.freedesktop_os_release()
    except OSError:
        return []
    return [fields["ID"], *fields.get("ID_LIKE", "").split(), fields.get("VERSION_ID", "")]


def distribution(image: str) -> str:
    """`debian` or `ubuntu`, whichever this host is or descends from.

    Raises:
        HostError: If it is neither.
    """
    for name in release():
        if name in CLOUD_KERNELS and platform.machine() == "x86_64":
            return name
    raise HostError(
        f"{image} is built from Debian's or Ubuntu's x86-64 packages and needs such a host."
    )


def search_path() -> str:
    """PATH with the directories of sfdisk and mke2fs, which an ordinary user's may lack."""
    return os.pathsep.join(filter(None, [os.environ.get("PATH"), "/usr/sbin", "/sbin"]))
