"""The image's cache: what is built when, and under which name it is kept.

In the cache directory:

    packages/            apt's lists and archives
    debian/
        current-RECIPE   which of the following this version of the library takes
        KEY/             an image: disk.qcow2, kernel, initrd, boot_args
        building/        the one build that is going on
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from smolvm_async.errors import HostError
from smolvm_async.foundation.files import replace_file, seal
from smolvm_async.foundation.progress import Meter, ProgressCallback
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build import packages
from smolvm_async.images.build.debian import disk, root
from smolvm_async.images.build.workshop import key_of, release, workshop

STEPS = 7
DEADLINE = 1800.0  # seconds for all of it; under TCG, on two slow processors, it takes 2 minutes

# Count this up when the builder, the guest's scripts or BOOT_ARGS change what an image holds: every
# user's image is then built anew. A change that the image does not show keeps the number.
RECIPE = 1

# Recipe 1's names by distribution, from when they were hashes of the builder's source: images from
# that time stay valid.
FIRST_RECIPE = {
    "debian 12": "9ce6eaa4a2e90ee9",
    "debian 13": "b63c1fe323d3dda6",
    "ubuntu debian 22.04": "d612785f48e0d6ec",
    "ubuntu debian 24.04": "47423d1232670a52",
    "ubuntu debian 25.10": "26ffc751362e4050",
    "ubuntu debian 26.04": "912bb27cf8dae97c",
}

# 8250.nr_uarts, nokaslr and the rest: each saves some of a boot's time under TCG, where the guest's
# processor is emulated and what protects it from itself protects nobody.
BOOT_ARGS = (
    "console=ttyS0 quiet root=/dev/vda rw nokaslr mitigations=off 8250.nr_uarts=1 audit=0 "
    "nowatchdog cryptomgr.notests ima_appraise=off random.trust_cpu=on panic=-1"
)


class DebianImage(NamedTuple):
    """A built image, as absolute paths.

    Attributes:
        disk: A qcow2, read-only.
        kernel: What QEMU loads.
        initrd: Its initramfs.
        boot_args: Its command line.
    """

    disk: Path
    kernel: Path
    initrd: Path
    boot_args: str


class Builder:
    """Builds the image in one cache directory."""

    def __init__(self, cache: Path, on_progress: ProgressCallback | None) -> None:
        self._store = cache / "debian"
        self._packages = cache / "packages"
        self._steps = Meter(on_progress, "image", STEPS)
        self._current = self._store / f"current-{_recipe()}"

    def find(self) -> DebianImage | None:
        """The image, if it was built before."""
        try:
            directory = self._store / self._current.read_text()
            boot_args = (directory / "boot_args").read_text()
        except OSError:
            return None
        return DebianImage(
            directory / "disk.qcow2", directory / "kernel", directory / "initrd", boot_args
        )

    async def build(self) -> DebianImage:
        """Build it, unless somebody else does, for whom this waits then.

        Raises:
            HostError: If it takes too long.
        """
        self._steps.report("taking the cache", 0)
        async with packages.exclusive(self._store):
            if (found := self.find()) is not None:
                return found
            try:
                async with asyncio.timeout(DEADLINE), workshop(self._store) as work:
                    await self._build(work)
            except TimeoutError:
                raise HostError(
                    f"The built-in Linux was not built within {DEADLINE / 60:g} minutes: see "
                    "whether this host's package sources answer, and try again."
                ) from None
        self._steps.report("the image is ready", STEPS)
        found = self.find()
        assert found is not None
        return found

    async def _build(self, work: Path) -> None:
        (work / "image").mkdir()
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
        """Give the image its name, whole and read-only, and then say that it is the one."""
        (work / "image" / "boot_args").write_text(BOOT_ARGS)
        for path in (work / "image").iterdir():
            seal(path, 0o444)
        target = self._store / name
        if target.exists():
            shutil.rmtree(target)  # nothing refers to it, or it would have been found
        os.replace(work / "image", target)
        replace_file(self._current, name.encode(), temporary=work / "current")


def _recipe() -> str:
    """Return the name of all that decides, besides the packages, what the image holds."""
    first = FIRST_RECIPE.get(" ".join(release()), "") if RECIPE == 1 else ""
    return first or key_of(release(), BOOT_ARGS, RECIPE)
