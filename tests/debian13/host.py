"""A minimal Debian 13 in a directory: its Python and QEMU, the library's wheel, and pytest.

Root installs Debian with mmdebstrap and enters the directory with chroot. Every mount is in a mount
namespace of its own, and every process in a PID namespace of its own, so the kernel removes both
when a test dies. The installed directories are kept in the cache of built images:

    debian13/
        KEY/          an installed Debian; its own cache keeps the packages and the stand-in
        building/     the installation that is running
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from smolvm_async.errors import CommandError, HostError
from smolvm_async.foundation import process
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build.packages import exclusive
from smolvm_async.images.build.workshop import key_of, own_sources, search_path, work_directory

PROJECT = Path(__file__).parents[2]
COPIED = ("tests", "examples", "pyproject.toml")

RECIPE = 1  # increase this if a change here changes the installed directory

# The README's packages for the library, and those that the builds of the guests need.
PACKAGES = (
    *("qemu-system-x86", "qemu-utils", "swtpm", "ovmf", "mtools", "fdisk", "e2fsprogs"),
    *("python3-venv", "ca-certificates"),
)
PYTHON_PACKAGES = ("pytest", "pytest-asyncio", "pytest-timeout")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BACKPORTS = "Package: qemu* seabios linux-*\nPin: release n=trixie-backports\nPin-Priority: 900\n"
OF_THE_HOST = ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
UNREACHABLE = r"Could not (connect|resolve)|Temporary failure|Cannot initiate|timed out"

ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
ENTER = """
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
mount -t tmpfs tmpfs "$0/tmp"
chroot "$0" env --ignore-environment --chdir=/src "$@"
exit  # the shell is process 1, which has to stay: it reaps orphans
"""
ENVIRONMENT = {
    "PATH": "/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "PYTHONPATH": "/src:/src/examples",
}
NETWORK = ("http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL")  # variables of the host


class Debian13(NamedTuple):
    """An installed Debian 13. Nothing but this process uses the directory."""

    root: Path

    async def run(self, *command: str) -> str:
        """Run a command in the directory `/src`, which has the tests and the examples."""
        of_the_host = {name: os.environ[name] for name in NETWORK if name in os.environ}
        variables = [f"{name}={value}" for name, value in {**ENVIRONMENT, **of_the_host}.items()]
        entered = [*ISOLATED, "sh", "-e", "-c", ENTER, str(self.root), *variables, *command]
        return await process.run(entered)


@asynccontextmanager
async def debian13(*, backports: bool, work: Path) -> AsyncIterator[Debian13]:
    """Install Debian 13, or find it in the cache, and install this tree's wheel into it.

    Args:
        backports: Take QEMU and the kernel of the built-in Linux from trixie-backports.
        work: An empty directory for the wheel.
    """
    await _check_host()
    store = xdg_home("XDG_CACHE_HOME", ".cache") / "smolvm-async" / "debian13"
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    parts = (RECIPE, PACKAGES, project["dependencies"])
    names = {both: key_of(both, *parts) for both in (False, True)}
    kept = store / names[backports]
    async with exclusive(store):
        wheel = await _make_wheel(work)
        if not kept.exists():
            for old in store.iterdir():  # half a gigabyte each
                if old.name not in names.values():
                    await in_background(shutil.rmtree, old)
            async with work_directory(store) as building:
                await _install(building / "root", wheel, backports=backports)
                await in_background(os.replace, building / "root", kept)
        system = Debian13(kept)
        await in_background(_copy_tree, kept, wheel)
        again = ("--no-deps", "--force-reinstall")
        await system.run("pip", "install", "--quiet", *again, f"/src/{wheel.name}")
        yield system


async def _check_host() -> None:
    """Skip the test, and say why, if this host cannot enter another system."""
    if os.geteuid() != 0:
        pytest.skip("Debian 13 is installed and entered by root")
    if shutil.which("mmdebstrap") is None or not KEYRING.exists():
        pytest.skip("this host lacks mmdebstrap or debian-archive-keyring, which install Debian 13")
    try:
        await process.run([*ISOLATED, "mount", "-t", "proc", "proc", "/proc"])
    except CommandError as error:
        pytest.skip(f"this host allows no namespaces with mounts of their own: {error}")


async def _make_wheel(work: Path) -> Path:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(work)]
    await process.run([*build, str(PROJECT)])
    (wheel,) = work.glob("*.whl")
    return wheel


async def _install(root: Path, wheel: Path, *, backports: bool) -> None:
    suites = ["trixie", "trixie-backports"] if backports else ["trixie"]
    sources = [f"deb [signed-by={KEYRING}] {_mirror()} {suite} main" for suite in suites]
    pin = f"--setup-hook=mkdir -p $1/etc/apt/preferences.d && printf '{BACKPORTS}' "
    options = [
        f"--include={','.join(PACKAGES)}",
        "--aptopt=APT::Install-Recommends false",
        "--dpkgopt=force-unsafe-io",  # an installation that is cut off is thrown away
        *([f"{pin} >$1/etc/apt/preferences.d/backports"] if backports else []),
    ]
    command = ["unshare", "--mount", "mmdebstrap", "--mode=root", "--variant=minbase"]
    try:
        await process.run(
            [*command, *options, "trixie", root, *sources], env={"PATH": search_path()}
        )
    except CommandError as error:
        if re.search(UNREACHABLE, error.output):
            pytest.skip(f"Debian's packages cannot be downloaded from {_mirror()}")
        raise
    for name in OF_THE_HOST:
        if Path(name).exists():
            shutil.copy(name, root / name.removeprefix("/"))
    (root / "src").mkdir()
    shutil.copy(wheel, root / "src")
    system = Debian13(root)
    await system.run("python3", "-m", "venv", "/venv")
    await system.run("pip", "install", "--quiet", f"/src/{wheel.name}", *PYTHON_PACKAGES)


def _mirror() -> str:
    """Return the URI of the host's Debian mirror; on a host without one, of Debian's own."""
    try:
        text = "".join(path.read_text() for path in own_sources())
    except HostError:
        text = ""
    found = re.search(r"(?m)^[^#\n]*?(https?://\S+/debian)/?(?:\s|$)", text)
    return found[1] if found else "http://deb.debian.org/debian"


def _copy_tree(root: Path, wheel: Path) -> None:
    """Copy the wheel and the tests, and remove the built-in Linux, which is to be built again."""
    shutil.rmtree(root / "src")
    (root / "src").mkdir()
    for name in COPIED:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, root / "src" / name)
        else:
            shutil.copy(PROJECT / name, root / "src")
    shutil.copy(wheel, root / "src")
    shutil.rmtree(root / "root/.cache/smolvm-async/debian", ignore_errors=True)
