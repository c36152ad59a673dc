"""The built-in Linux: a Debian (or Ubuntu) made once from the host's package sources, without root.

Its packages are unpacked into a file system, which is then booted once: `dpkg --configure` runs in
the guest, as root there. From then on it is started by a kernel that QEMU loads, and a small init
of ours (guest/init.sh) that starts an SSH server and little else.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from smolvm_async.errors import HostError
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build.debian.builder import Builder, DebianImage
from smolvm_async.images.build.workshop import distribution, search_path

__all__ = ["DebianImage", "build_debian", "check_host", "find_debian"]

PROGRAMS = {  # and the packages that have them
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
}


async def build_debian(
    *, cache_dir: Path | None = None, on_progress: ProgressCallback | None = None
) -> DebianImage:
    """Build the image, or find it in the cache.

    The first build fetches some 100 MB of packages. The cache may be deleted at any time at which
    no VM is there that was made from it.

    Args:
        cache_dir: Where images and packages are kept; `~/.cache/smolvm-async` if not given.
        on_progress: Called with each step.

    Raises:
        HostError: If the host is not Debian or Ubuntu, lacks a program, or the cache cannot be
            written.
        CommandError: If a package cannot be fetched, or a program fails.
    """
    builder = Builder(_cache(cache_dir), on_progress)
    try:
        found = await in_background(builder.find)
        if found is None:
            check_host()
            found = await builder.build()
    except OSError as error:
        raise HostError(
            f"The built-in Linux cannot be built in {_cache(cache_dir)}: {error}"
        ) from error
    return found


def find_debian(cache_dir: Path | None = None) -> DebianImage | None:
    """The image, if it was built before; a matter of milliseconds."""
    return Builder(_cache(cache_dir), None).find()


def check_host() -> None:
    """Whether this host can build it.

    Raises:
        HostError: It says what is missing.
    """
    distribution("The built-in Linux")
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if missing:
        wanted = " ".join(sorted({PROGRAMS[name] for name in missing}))
        raise HostError(
            f"To build the built-in Linux this host lacks {', '.join(missing)}. Install them with: "
            f"sudo apt-get install {wanted}. Or pass image= with the path of a qcow2, and os=."
        )


def _cache(cache_dir: Path | None) -> Path:
    return (cache_dir or xdg_home("XDG_CACHE_HOME", ".cache") / "smolvm-async").absolute()
