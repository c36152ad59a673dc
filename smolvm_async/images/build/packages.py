"""Download packages of Debian or Ubuntu without root.

`apt-get` runs with the host's own sources, keys and proxies, but with lists and archives in a
directory of the library, and with an empty package database. So apt-get needs neither root nor the
host's database, and its results do not depend on the packages that the host has installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from pathlib import Path

from smolvm_async.errors import CommandError
from smolvm_async.foundation import process
from smolvm_async.foundation.files import make_private, sha256_of
from smolvm_async.foundation.fork import close_private
from smolvm_async.foundation.locking import poll, try_lock
from smolvm_async.foundation.progress import Meter
from smolvm_async.foundation.tasks import in_background
from smolvm_async.host.identity import this_host

POLL = 0.1  # seconds

_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_URI = re.compile(r"'[^']*' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<digest>\w+)")


@contextlib.asynccontextmanager
async def exclusive(directory: Path) -> AsyncIterator[None]:
    """Hold a lock on `directory` during the block; create the directory if it is missing.

    Other tasks and processes wait. The lock is on the directory itself, so no lock file is needed.
    The kernel releases the lock when the process ends.
    """
    make_private(directory)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        await poll(partial(try_lock, descriptor))
        yield
    finally:
        close_private(descriptor)


async def update(cache: Path) -> None:
    """Update the package lists in `cache`.

    A missing answer of one source is not an error if another source answers.
    """
    async with exclusive(cache):
        for name in ("lists/partial", "archives/partial"):
            make_private(cache / name)
        (cache / "status").touch()
        output = await _apt("apt-get", cache, "update")
    if not any((cache / "lists").glob("*_Packages*")):
        message = (
            "apt-get update downloaded no package lists; check the network, and the package "
            f"sources in /etc/apt. Its output:\n{output.strip()}"
        )
        raise CommandError(message, command=("apt-get", "update"), returncode=0, output=output)


async def dependencies(names: Sequence[str], cache: Path) -> list[str]:
    """Return `names` and all their dependencies, including all alternatives, sorted."""
    flags = ("--recurse", "--important", "--no-pre-depends")
    output = await _apt("apt-cache", cache, "depends", *flags, *names)
    return sorted(set(filter(_NAME.fullmatch, output.splitlines())))


async def installation(names: Sequence[str], cache: Path) -> list[str]:
    """Return the sorted packages that apt-get would install for `names` on an empty system.

    Args:
        names: Names of packages, or patterns (apt-patterns(7)) such as `?essential`.
    """
    flags = ("--simulate", "--no-install-recommends", "--yes")
    output = await _apt("apt-get", cache, "install", *flags, *names)
    return sorted(re.findall(r"(?m)^Inst (\S+) ", output))


async def fetch(names: Sequence[str], cache: Path, meter: Meter | None = None) -> list[Path]:
    """Download the newest versions of `names`, without their dependencies; return the `.deb` files.

    Do not download existing, undamaged files again. apt-get verifies its downloads.
    """
    archives = cache / "archives"
    async with exclusive(cache):
        output = await _apt("apt-get", cache, "download", "--print-uris", *names)
        offers = {match["file"]: match for match in _URI.finditer(output)}
        if len(offers) != len(set(names)):
            raise CommandError(
                f"apt-get download did not print the digest of each package:\n{output.strip()}",
                command=("apt-get", "download", *names),
                returncode=0,
                output=output,
            )
        present = await in_background(digests, archives, list(offers))
        missing = {
            file: int(offer["size"])
            for file, offer in offers.items()
            if present[file] != offer["digest"]
        }
        if missing:
            await _download(missing, cache, meter or Meter(None, "image"))
    return sorted(archives / file for file in offers)


def digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each file in `directory`, in hexadecimal; "" for a missing file."""
    found = dict.fromkeys(names, "")
    for name in found:
        with contextlib.suppress(FileNotFoundError):
            found[name] = sha256_of(directory / name)
    return found


async def _download(sizes: dict[str, int], cache: Path, meter: Meter) -> None:
    """Download into another directory, then move the files: `archives` has only complete files."""
    arriving = cache / f"arriving-{this_host().key}"  # the lock may not exclude other hosts
    await in_background(shutil.rmtree, arriving, True)
    arriving.mkdir(0o700)
    watching = asyncio.create_task(_watch(arriving, sum(sizes.values()), meter))
    try:
        names = [file.partition("_")[0] for file in sizes]
        await _apt("apt-get", cache, "download", *names, cwd=arriving)
        for file in sizes:
            os.replace(arriving / file, cache / "archives" / file)
    finally:
        watching.cancel()
        await in_background(shutil.rmtree, arriving, True)


async def _watch(directory: Path, total: int, meter: Meter) -> None:
    while True:
        meter.report("downloading packages", _size(directory), total)
        await asyncio.sleep(POLL)


def _size(directory: Path) -> int:
    size = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # apt-get has just renamed the file
            size += path.stat().st_size
    return size


async def _apt(program: str, cache: Path, *words: str, cwd: Path | None = None) -> str:
    options = {
        "Dir::State": cache,
        "Dir::State::lists": cache / "lists",
        "Dir::State::status": cache / "status",
        "Dir::Cache": cache,
        "Dir::Cache::archives": cache / "archives",
        "APT::Sandbox::User": "root",  # as root, apt switches to a user without access to `cache`
        "Acquire::Languages": "none",
        "Acquire::ForceHash": "SHA256",
    }
    settings = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    # If apt is killed, its temporary files are removed with this directory. A TemporaryDirectory
    # would be removed by a forked child, too.
    temporary = tempfile.mkdtemp(dir=cache)
    try:
        environment = {"LC_ALL": "C.UTF-8", "TMPDIR": temporary}
        return await process.run([program, *settings, *words], cwd=cwd, env=environment)
    finally:
        await in_background(shutil.rmtree, temporary, True)
