"""Helpers that all image builders share: a work directory, keys, checks of the host."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from smolvm_async.errors import HostError
from smolvm_async.foundation.tasks import in_background
from smolvm_async.host.identity import this_host

# Packages of kernels that have only drivers for virtual machines, by distribution.
CLOUD_KERNELS = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}

LONGEST_BUILD = 86_400.0  # seconds; an older work directory was left by a builder that died

# Replaces the host's /etc/mke2fs.conf, whose content differs between releases.
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
async def work_directory(store: Path) -> AsyncIterator[Path]:
    """Create a work directory in the locked `store`; remove the directory after the block.

    The lock may not exclude other hosts, so each host has a work directory of its own.
    """
    work = store / f"building-{this_host().key}"
    await in_background(_remove_leftovers, work)
    work.mkdir(0o700)
    try:
        yield work
    finally:
        await in_background(shutil.rmtree, work)


def _remove_leftovers(work: Path) -> None:
    """Remove what killed builders left. Only the caller has the lock of this host."""
    for left in work.parent.glob("building*"):
        with suppress(FileNotFoundError):  # another host has just removed it
            if left == work or time.time() - left.stat().st_mtime > LONGEST_BUILD:
                shutil.rmtree(left)


def key_of(*parts: object) -> str:
    """Return a hash of these parts, to use as a name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def release() -> list[str]:
    """Return this host's distribution, the distributions that it derives from, and its version."""
    try:
        fields = platform.freedesktop_os_release()
    except OSError:
        return []
    return [fields["ID"], *fields.get("ID_LIKE", "").split(), fields.get("VERSION_ID", "")]


def distribution(image: str) -> str:
    """Return the host's distribution, or the one that it derives from: `debian` or `ubuntu`.

    Args:
        image: The image to build, for messages, such as "the stand-in".
    """
    for name in release():
        if name in CLOUD_KERNELS and platform.machine() == "x86_64":
            return name
    raise HostError(
        f"Only a host with Debian or Ubuntu on x86-64 can build {image}.",
        hint="On this host, pass image= with the path of a qcow2, and os=.",
    )


def search_path() -> str:
    """Return PATH plus the directories of sfdisk and mke2fs, which a user's PATH may lack."""
    return os.pathsep.join(filter(None, [os.environ.get("PATH"), "/usr/sbin", "/sbin"]))


def own_sources() -> list[Path]:
    """Return the files in /etc/apt with package sources of this host's own distribution."""
    apt = Path("/etc/apt")
    directory = apt / "sources.list.d"
    files = [apt / "sources.list", *directory.glob("*.list"), *directory.glob("*.sources")]
    own = r"(?m)^[^#]*(debian|ubuntu)[^#]*\bmain\b|^URIs:.*(debian|ubuntu)"
    found = [path for path in sorted(files) if path.is_file() and re.search(own, path.read_text())]
    if not found:
        raise HostError(
            "This host has no package source of its own distribution.",
            hint="Add a source to /etc/apt/sources.list.d.",
        )
    return found


def check_programs(image: str, packages: Mapping[str, str], hint: str = "") -> None:
    """Check that the host is a Debian or Ubuntu, and has the programs that build an image.

    Args:
        image: The image, for messages, such as "the stand-in".
        packages: The programs that the build runs, and the package of each program.
        hint: An alternative to installing the programs, appended to the error's hint.
    """
    distribution(image)
    path = search_path()
    missing = tuple(name for name in packages if shutil.which(name, path=path) is None)
    if missing:
        wanted = " ".join(sorted({packages[name] for name in missing}))
        raise HostError(
            f"This host lacks {', '.join(missing)}, needed to build {image}.",
            hint=f"Install the programs with: sudo apt-get install {wanted}{hint}",
            missing=missing,
        )
