"""Build variants of the stand-in in a cache directory, or find them there.

::

    packages/                  apt's lists and archives
    stand-in/
        packages-RECIPE.json   the packages used to build this recipe, and their digests
        base-KEY.raw           the disk without grub.cfg; all variants of a flavour share this file
        stand-in-KEY.qcow2     the finished disks
        building-HOST/         the work directory of a host's current build
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from smolvm_async.foundation import process
from smolvm_async.foundation.files import replace_file, seal
from smolvm_async.foundation.progress import Meter, ProgressCallback
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build import packages
from smolvm_async.images.build.workshop import key_of, release, work_directory
from stand_in import disk, system

STEPS = 6

# Increase this if a change of the builder or the guest's scripts changes the disk's content.
RECIPE = 14

Digests = dict[str, str]  # the SHA-256 of each package, by file name


class Builder:
    """Builds one variant of the stand-in in one cache directory."""

    def __init__(
        self,
        cache: Path,
        flavour: system.Flavour,
        kernel_arguments: Sequence[str],
        on_progress: ProgressCallback | None,
    ) -> None:
        self._store = cache.absolute() / "stand-in"
        self._packages = cache.absolute() / "packages"
        self._flavour = flavour
        self._kernel_arguments = tuple(kernel_arguments)
        self._steps = Meter(on_progress, "image", STEPS)
        self._recipe = _recipe(flavour)

    def find(self) -> Path | None:
        """Return the disk, or `None` if it was not built yet; this takes milliseconds."""
        digests = self._last_packages()
        result = self._result(digests) if digests else None
        return result if result and result.exists() else None

    async def build(self) -> Path:
        """Build the missing files, or wait for the process that already builds in this cache."""
        self._steps.report("waiting for other builds", 0)
        async with packages.exclusive(self._store):
            digests = await self._known_packages() or await self._fetch_packages()
            base, result = self._base(digests), self._result(digests)
            if not result.exists():
                async with work_directory(self._store) as work:
                    if not base.exists():
                        await self._build_base(digests, work, base)
                    self._steps.report("making the disk", 5)
                    made = await disk.make_variant(base, work, self._kernel_arguments)
                    await in_background(_keep, made, result)
        self._steps.report("the stand-in is ready", STEPS)
        return result

    async def _build_base(self, digests: Digests, work: Path, base: Path) -> None:
        self._steps.report("unpacking packages", 2)
        (work / "unpacked").mkdir()
        for name in digests:  # extract the files only: do not run the packages' scripts
            await process.run(["dpkg-deb", "--extract", self._archives / name, work / "unpacked"])
        self._steps.report("arranging the guest's files", 3)
        await system.arrange(work / "unpacked", work, self._flavour)
        self._steps.report("making the file systems", 4)
        made = await disk.make_base(work)
        await in_background(_keep, made, base)

    # Packages

    async def _known_packages(self) -> Digests | None:
        """Return the packages of the last build if the base exists or can be built from them."""
        digests = self._last_packages()
        if digests is None or self._base(digests).exists():
            return digests
        present = await in_background(packages.digests, self._archives, digests)
        return digests if present == digests else None

    async def _fetch_packages(self) -> Digests:
        self._steps.report("looking up packages", 1)
        await packages.update(self._packages)
        names = await system.package_names(self._packages, self._flavour)
        debs = await packages.fetch(names, self._packages, self._steps)
        files = [deb.name for deb in debs]
        digests = await in_background(packages.digests, self._archives, files)
        replace_file(self._packages_file, json.dumps(digests, indent=1).encode())
        return digests

    @property
    def _archives(self) -> Path:
        return self._packages / "archives"

    # Names in the cache

    @property
    def _packages_file(self) -> Path:
        return self._store / f"packages-{self._recipe}.json"

    def _last_packages(self) -> Digests | None:
        try:
            digests: Digests = json.loads(self._packages_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return digests

    def _base(self, digests: Digests) -> Path:
        return self._store / f"base-{key_of(self._recipe, digests)}.raw"

    def _result(self, digests: Digests) -> Path:
        key = key_of(self._recipe, digests, self._kernel_arguments)
        return self._store / f"stand-in-{key}.qcow2"


def _recipe(flavour: system.Flavour) -> str:
    """Return a name for everything that the disk depends on, except its packages."""
    return key_of(release(), flavour.name, RECIPE)


def _keep(made: Path, name: Path) -> None:
    """Make a finished file read-only, and give it its name in the cache."""
    seal(made, 0o444)
    os.replace(made, name)
