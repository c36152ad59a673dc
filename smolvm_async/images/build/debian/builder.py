"""Build the built-in Linux in a cache directory, or find it there.

::

    packages/            apt's lists and archives
    debian/
        current-RECIPE   the name of the image that this version of the library uses
        KEY/             an image: disk.qcow2, kernel, initrd, boot_args
        building-HOST/   the work directory of a host's current build
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from smolvm_async.errors import HostError
from smolvm_async.foundation.files import replace_file, seal
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.foundation.progress import Meter, ProgressCallback
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build.workshop import (
    check_programs,
    key_of,
    own_sources,
    release,
    work_directory,
)

PROGRAMS = {  # the programs that the build runs, and their packages
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
}
STEPS = 7
DEADLINE = 1800.0  # seconds for a build; under TCG, on two slow processors, a build takes 2 minutes

# Increase this if a change of the builder, the guest's scripts or BOOT_ARGS changes the content of
# the image. Every user's image is then rebuilt, so do not increase it for, say, a new comment.
RECIPE = 5

# These arguments make a boot under TCG faster. The mitigations are off, since they protect against
# flaws of real processors, which an emulated processor does not have.
BOOT_ARGS = (
    "console=ttyS0 quiet root=/dev/vda rw nokaslr mitigations=off 8250.nr_uarts=1 audit=0 "
    "nowatchdog cryptomgr.notests ima_appraise=off random.trust_cpu=on panic=-1"
)


class DebianImage(NamedTuple):
    """A built image; the paths are absolute."""

    disk: Path  # a read-only qcow2
    kernel: Path
    initrd: Path
    boot_args: str  # the kernel's command line


async def build_debian(
    *, cache_dir: Path | None = None, on_progress: ProgressCallback | None = None
) -> DebianImage:
    """Build the image, or find it in the cache.

    The first build downloads some 100 MB of packages. Do not delete the cache while a VM exists
    that uses an image in the cache.

    Args:
        cache_dir: The directory for images and packages; by default `~/.cache/smolvm-async`.
    """
    builder = Builder(cache_dir, on_progress)
    try:
        found = await in_background(builder.find)
        if found is None:
            check_host()
            found = await builder.build()
    except OSError as error:
        raise HostError(
            f"The built-in Linux cannot be built in {str(builder.cache)!r}: {error}.",
            hint="Free some space, or set XDG_CACHE_HOME to a directory that this user can "
            "write to.",
        ) from error
    return found


def find_debian(cache_dir: Path | None = None) -> DebianImage | None:
    """Return the image, or `None` if it was not built yet; this takes milliseconds."""
    return Builder(cache_dir).find()


def check_host() -> None:
    """Check that this host is a Debian or Ubuntu with what builds the image.

    Raises:
        HostError: If a program or a package source is missing.
    """
    other = ". Or pass image= with the path of a qcow2, and os=."
    check_programs("the built-in Linux", PROGRAMS, other)
    own_sources()


class Builder:
    """Builds the image in one cache directory."""

    def __init__(self, cache_dir: Path | None, on_progress: ProgressCallback | None = None) -> None:
        self.cache = (cache_dir or xdg_home("XDG_CACHE_HOME", ".cache") / "smolvm-async").absolute()
        self._store = self.cache / "debian"
        self._packages = self.cache / "packages"
        self._steps = Meter(on_progress, "image", STEPS)
        self._current = self._store / f"current-{_recipe()}"

    def find(self) -> DebianImage | None:
        """Return the image, or `None` if it was not built yet."""
        try:
            directory = self._store / self._current.read_text()
            boot_args = (directory / "boot_args").read_text()
        except (OSError, ValueError):  # it was never built, or a file was damaged
            return None
        return DebianImage(
            directory / "disk.qcow2", directory / "kernel", directory / "initrd", boot_args
        )

    async def build(self) -> DebianImage:
        """Build the image, or wait for the process that is already building it."""
        # Each first VM looks for the image, and few build it.
        from smolvm_async.images.build import packages

        self._steps.report("waiting for other builds", 0)
        async with packages.exclusive(self._store):
            if (found := self.find()) is not None:
                return found
            try:
                async with asyncio.timeout(DEADLINE), work_directory(self._store) as work:
                    await self._build(work)
            except TimeoutError:
                raise HostError(
                    f"The build of the built-in Linux took over {DEADLINE / 60:g} minutes: check "
                    "that this host's package sources answer, and try again."
                ) from None
        self._steps.report("the image is ready", STEPS)
        found = self.find()
        assert found is not None
        return found

    async def _build(self, work: Path) -> None:
        from smolvm_async.images.build import packages
        from smolvm_async.images.build.debian import disk, root

        (work / "image").mkdir(0o700)
        self._steps.report("looking up packages", 1)
        await packages.update(self._packages)
        names = await root.package_names(self._packages)
        debs = await packages.fetch(names, self._packages, self._steps)
        self._steps.report("unpacking packages", 2)
        unpacked = await root.unpack(debs, work)
        self._steps.report("arranging the guest's files", 3)
        await root.arrange(unpacked, work)
        self._steps.report("making the file system", 4)
        await disk.make(work)
        self._steps.report("configuring packages in the guest", 5)
        await disk.configure(work, BOOT_ARGS, len(debs), self._steps)
        self._steps.report("making the disk", 6)
        await disk.convert(work)
        await in_background(self._keep, work, key_of(_recipe(), [deb.name for deb in debs]))

    def _keep(self, work: Path, name: str) -> None:
        """Make the image read-only, move it to its final name, and make it the current image."""
        (work / "image" / "boot_args").write_text(BOOT_ARGS)
        for path in (work / "image").iterdir():
            seal(path, 0o444)
        target = self._store / name
        if target.exists():
            shutil.rmtree(target)  # no `current` file names it, else find() would have found it
        os.replace(work / "image", target)
        replace_file(self._current, name.encode(), temporary=work / "current")


def _recipe() -> str:
    """Return a name for everything that the image depends on, except its packages."""
    return key_of(release(), BOOT_ARGS, RECIPE)
