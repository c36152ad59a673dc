"""The host guest: a guest in which `/dev/kvm` works, on a host that has no KVM.

QEMU's TCG emulates AMD's SVM for `-cpu max`, so `kvm_amd` loads in a guest with a generic kernel.
The disk is made of the host's own packages by the library's builder, without root. No maintainer
script runs. It has the files of a host (QEMU, swtpm, OVMF, Python, the library's dependencies and
pytest), the images to boot there, and the init of the built-in Debian. It is kept in the cache:

    kvm/
        KEY/          disk.qcow2, kernel, initrd
        building/     the build that is running
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from smolvm_async.foundation import process
from smolvm_async.foundation.paths import xdg_home
from smolvm_async.foundation.tasks import in_background
from smolvm_async.images.build import packages
from smolvm_async.images.build.boot_files import (
    decompress_kernel,
    find_file,
    install,
    make_initramfs,
    modules,
)
from smolvm_async.images.build.debian import DebianImage, build_debian, disk, root
from smolvm_async.images.build.debian.builder import BOOT_ARGS
from smolvm_async.images.build.workshop import distribution, key_of, release, work_directory
from stand_in import build_stand_in
from stand_in.system import DESKTOP, LOADER

RECIPE = 1  # increase this if a change here changes the disk's content

PACKAGES = (
    *("?essential", "usr-is-merged", "openssh-server", "python3", "kmod", "procps"),
    *("qemu-system-x86", "qemu-utils", "swtpm", "ovmf", "seabios"),
)
DRIVERS = (*root.DRIVERS, "kvm_amd")
PYTHON_PACKAGES = ("pytest", "anyio")

PROJECT = Path(__file__).parents[2]
LIBRARIES = "usr/lib/python3/dist-packages"  # in the path of Debian's Python
STAND_IN = "root/stand-in.qcow2"


async def build_host_guest() -> DebianImage:
    """Build the host guest, or find it in the cache."""
    image, stand_in = await build_debian(), await build_stand_in()
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    python_packages = [*project["dependencies"], *PYTHON_PACKAGES]
    cache = xdg_home("XDG_CACHE_HOME", ".cache") / "smolvm-async"
    store = cache / "kvm"
    images = (image.disk.parent.name, stand_in.name)
    kept = store / key_of(release(), RECIPE, python_packages, images)
    async with packages.exclusive(store):
        if not kept.exists():
            for old in store.iterdir():  # a gigabyte each; a running VM keeps its disk open
                await in_background(shutil.rmtree, old)
            async with work_directory(store) as work:
                (work / "image").mkdir()
                tree = await _install(work, cache / "packages", python_packages)
                await in_background(_copy_images, tree, image, stand_in)
                await disk.make(work)
                await disk.convert(work)
                await in_background(os.replace, work / "image", kept)
    return DebianImage(kept / "disk.qcow2", kept / "kernel", kept / "initrd", BOOT_ARGS)


async def _install(work: Path, cache: Path, python_packages: Sequence[str]) -> Path:
    """Unpack all packages into a tree, and make the kernel and the initramfs beside it."""
    await packages.update(cache)
    kernel = DESKTOP.kernels[distribution("the host guest")]
    images = await packages.dependencies([kernel], cache)
    names = [name for name in images if re.match(r"linux-(image|modules)-\d", name)]
    wanted = [*await packages.installation(PACKAGES, cache), *names, "busybox-static"]
    tree = await root.unpack(await packages.fetch(wanted, cache), work)
    drivers = await modules(tree / "usr/lib/modules", DRIVERS)
    await in_background(_arrange, tree, work, drivers)
    await _install_python_packages(tree, python_packages)
    return tree


async def _install_python_packages(tree: Path, python_packages: Sequence[str]) -> None:
    """Install packages for the guest's Python, and compile all of its modules.

    The guest would take a minute to compile them. The guest's Python runs here by its own loader.
    """
    python = tree / "usr/bin/python3"
    version = (await asyncio.to_thread(os.readlink, python)).removeprefix("python")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-compile")
    where = ("--python-version", version, "--only-binary=:all:", "--target", tree / LIBRARIES)
    await process.run([*pip, *where, *python_packages])
    loader = (tree / "usr/lib64" / LOADER, "--library-path", tree / "usr/lib/x86_64-linux-gnu")
    compiling = ("-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash")
    paths = ("-s", tree, "-p", "/", tree / LIBRARIES, tree / f"usr/lib/python{version}")
    environment = {"PYTHONHOME": str(tree / "usr")}
    await process.run([*loader, python, *compiling, *paths], env=environment)


def _arrange(tree: Path, work: Path, drivers: Sequence[Path]) -> None:
    initrd = make_initramfs(tree, root.GUEST / "initramfs.sh", drivers, work / "initramfs")
    (work / "image/initrd").write_bytes(initrd)
    kernel = find_file(tree / "boot", ["vmlinuz-*"]).read_bytes()
    (work / "image/kernel").write_bytes(decompress_kernel(kernel))
    for name in ("boot", "usr/lib/modules"):
        shutil.rmtree(tree / name)
    own = tree / root.OWN
    install(find_file(tree, ["busybox"]), own / "busybox", 0o755)
    install(root.GUEST / "init.sh", own / "init", 0o755)
    settings = (root.GUEST / "sshd_config").read_text()
    # The builder's user owns the files, since only root could give them to root.
    (own / "sshd_config").write_text(f"{settings}StrictModes no\n")
    for name in ("passwd", "group"):
        install(tree / f"usr/share/base-passwd/{name}.master", tree / "etc" / name)
    with (tree / "etc/passwd").open("a") as passwd:
        passwd.write("sshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n")
    for name in ("proc", "sys", "dev", "run", "tmp"):
        (tree / name).mkdir(exist_ok=True)


def _copy_images(tree: Path, image: DebianImage, stand_in: Path) -> None:
    kept = tree / "root/.cache/smolvm-async/debian"
    shutil.copytree(image.disk.parent, kept / image.disk.parent.name)
    for current in image.disk.parents[1].glob("current-*"):
        if current.read_text() == image.disk.parent.name:
            install(current, kept / current.name)
    install(stand_in, tree / STAND_IN)
