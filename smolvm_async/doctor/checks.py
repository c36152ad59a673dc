"""The checks that do not boot a guest: kernel, programs, firmware, disk space and memory."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import socket
import stat
import sys
import time
from functools import partial
from pathlib import Path

from smolvm_async.doctor.findings import Check, Verdict, blamed, failed, ok, warning
from smolvm_async.doctor.network_guard import check_network_guard
from smolvm_async.doctor.probe import DISK, make_disk, scratch
from smolvm_async.errors import CommandError, ConfigError, HostError, ImageError
from smolvm_async.foundation.process import check_pidfds, run
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.guests import GuestProfile
from smolvm_async.host.distribution import OVMF, QEMU, QEMU_IMG, SETPRIV, Program, how_to_install
from smolvm_async.host.firmware import Firmware, descriptor_directories, find_firmware, places
from smolvm_async.host.memory import available_memory
from smolvm_async.host.restrictions import find_noexec, find_restrictions
from smolvm_async.images.local import open_image
from smolvm_async.qemu.sidecars import SIDECARS, Sidecar
from smolvm_async.state.directory import VMDirectory, describe_loose, loose_parent, open_directory

OLDEST_QEMU = (7, 1)
TESTED_QEMU = "7.2, 10.0 and 11.1"

GIB = 1 << 30
LITTLE, TOO_LITTLE = 10 * GIB, 1 * GIB  # bytes of free disk space
SAMPLE, BLOCK = "sample", bytes(1 << 20)

# Prints the parent-death signal of its own process, which setpriv must have set; prctl(2).
SHOW_SIGNAL = """
import ctypes
signal = ctypes.c_int()
PR_GET_PDEATHSIG = 2
ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(signal))
print(signal.value)
"""

ELSEWHERE = "Pass the path of a directory on a local disk, which this user owns, as data_dir=."


def host_checks(data_dir: Path) -> list[Check]:
    """Return the checks that do not depend on the guest OS."""
    return [
        Check("kernel", check_kernel),
        Check("python", check_python),
        Check("setpriv", check_setpriv),
        Check("system-calls", check_system_calls),
        Check("data-dir", partial(check_data_dir, data_dir)),
        Check("network-guard", partial(check_network_guard, data_dir), ("setpriv", "data-dir")),
        Check("disk", partial(check_disk, data_dir), needs=("data-dir",)),
    ]


def guest_checks(profile: GuestProfile, data_dir: Path) -> list[Check]:
    """Return the checks for one guest OS that do not boot its machine."""
    needs = ("setpriv", "data-dir", "disk")
    return [
        Check("memory", partial(check_memory, profile)),
        *(
            Check(name, partial(check_sidecar, SIDECARS[name], data_dir), needs)
            for name in profile.sidecars
        ),
        Check("qemu", check_qemu, needs),
        Check("qemu-img", partial(check_qemu_img, data_dir), needs),
        Check("firmware", partial(check_firmware, profile), needs),
    ]


# The system


def check_kernel() -> Verdict:
    """Check that pidfds work. The event loop watches child processes with pidfds."""
    release = platform.release()
    try:
        check_pidfds()
    except HostError as error:
        return failed(f"Linux {release}: {error.message}", error.hint)
    return ok(f"Linux {release}; pidfd works")


def check_system_calls() -> Verdict:
    """Try what containers and services often refuse, and what no other check would notice."""
    problems = find_restrictions()
    if problems:
        reasons, cures = zip(*problems, strict=True)
        return failed("; ".join(reasons), " ".join(cures))
    return ok("/proc, sockets, the loopback interface and memory files work")


def check_python() -> Verdict:
    """Report the version of Python."""
    return ok(f"Python {platform.python_version()} ({sys.executable})")


async def check_setpriv() -> Verdict:
    """Check the parent-death signal. Without it, QEMU would outlive a killed Python."""
    if shutil.which(SETPRIV.name) is None:
        return _missing(SETPRIV)
    cure = f"Use util-linux 2.33 or newer. {how_to_install([SETPRIV])}."
    try:  # `run` itself prepends `setpriv --pdeathsig KILL --`
        shown = (await run([sys.executable, "-I", "-S", "-c", SHOW_SIGNAL])).strip()
    except CommandError as error:
        return blamed(f"setpriv --pdeathsig does not work: {error}", cure)
    if shown != str(int(signal.SIGKILL)):
        return failed(f"setpriv --pdeathsig KILL had no effect: prctl(2) shows {shown!r}", cure)
    return ok("setpriv sets the parent-death signal: no process outlives its owner")


def check_memory(profile: GuestProfile) -> Verdict:
    """Compare the available memory with the memory of a guest."""
    memory = available_memory()
    found = f"{memory.available} of {memory.total} MiB are available ({memory.limit})"
    guest, default, minimum = profile.title, profile.default_memory, profile.minimum_memory
    if memory.available < minimum:
        return failed(
            f"{found}; a {guest} guest needs at least {minimum} MiB",
            "Close other programs, or raise the limit of this container or service.",
        )
    if memory.available < default:
        return warning(
            f"{found}; a {guest} guest takes {default} MiB by default",
            f"Pass memory={minimum}, or close other programs.",
        )
    return ok(f"{found}; a {guest} guest takes {default} MiB by default")


def check_built_in_linux() -> Verdict:
    """Look for the built-in Linux image, or for everything that its build needs."""
    from smolvm_async.images.build.debian import check_host, find_debian

    if (image := find_debian()) is not None:
        return ok(f"the built-in Linux is built: {image.disk}")
    try:
        check_host()
    except HostError as error:
        return warning(f"the built-in Linux cannot be built: {error.message}", error.hint)
    return ok("this host has what builds the built-in Linux; the first VM will build it")


# Programs and firmware


async def check_qemu() -> Verdict:
    """Report QEMU's version. The boot of the firmware shows whether QEMU works."""
    version = await _version(QEMU)
    if isinstance(version, Verdict):
        return version
    numbers = re.search(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST_QEMU:
        return warning(
            f"{version} is old: this library is tested with QEMU {TESTED_QEMU}",
            f"Upgrade QEMU, or your distribution. {how_to_install([QEMU])}.",
        )
    return ok(f"{version} (tested with {TESTED_QEMU})")


async def check_qemu_img(data_dir: Path) -> Verdict:
    """Make a disk with qemu-img, and open the disk."""
    version = await _version(QEMU_IMG)
    if isinstance(version, Verdict):
        return version
    async with scratch(data_dir) as state:
        try:
            await make_disk(Path(QEMU_IMG.name), state.path)
            with open_image(state.path / DISK):
                pass
        except (CommandError, ImageError) as error:
            return blamed(f"qemu-img did not make a qcow2: {error}", path=state.path)
    return ok(f"{version}; it made a qcow2")


async def check_sidecar(sidecar: Sidecar, data_dir: Path) -> Verdict:
    """Test a sidecar's program without QEMU."""
    version = await _version(sidecar.program)
    if isinstance(version, Verdict):
        return version
    async with scratch(data_dir) as state:
        try:
            shown = await sidecar.try_out(Path(sidecar.program.name), state.path)
        except CommandError as error:
            return blamed(f"{version} does not work: {error}", path=state.path)
    return ok(f"{version}; {shown}")


def check_firmware(profile: GuestProfile) -> Verdict:
    """Look for a firmware pair with the features that a guest OS needs."""
    firmware = find_pair(profile)
    if firmware is None:
        looked = ", ".join(places(descriptor_directories(os.environ)))
        features = ", ".join(sorted(profile.firmware_features))
        found = f"no UEFI firmware with {features} found in: {looked}"
        return failed(found, f"{how_to_install([OVMF])}.")
    return ok(f"{firmware.code} with {firmware.vars_template}")


def find_pair(profile: GuestProfile) -> Firmware | None:
    """Return the firmware pair for a guest OS; `None` if the host has none."""
    return find_firmware(profile.firmware_features, descriptor_directories(os.environ))


async def _version(program: Program) -> str | Verdict:
    """Return the first line that `--version` prints, or the verdict if the program fails."""
    if shutil.which(program.name) is None:
        return _missing(program)
    try:
        printed = await run([program.name, "--version"])
    except CommandError as error:
        return blamed(f"{program.name} does not run: {error}", _reinstall(program))
    first = printed.strip().partition("\n")[0].partition(", Copyright")[0]
    return first or f"{program.name} (unknown version)"


def _missing(program: Program) -> Verdict:
    path = os.environ.get("PATH", os.defpath)
    if (problem := find_noexec(program.name, path)) is not None:
        return failed(*problem)
    return failed(f"{program.name} not found in PATH ({path})", f"{how_to_install([program])}.")


def _reinstall(program: Program) -> str:
    return f"Reinstall {program.name}. {how_to_install([program])}."


# The data directory


async def check_data_dir(data_dir: Path) -> Verdict:
    """Make, lock, inspect and remove a VM's directory that contains a socket."""
    try:
        async with scratch(data_dir) as state:
            problem = await in_thread(_problem, state.path)
            path = state.path
    except ConfigError as error:
        return failed(error.message, error.hint or ELSEWHERE)
    if not problem and path.exists():
        problem = f"{path} still exists after its removal"
    if problem:
        return blamed(problem, ELSEWHERE, data_dir)
    if parent := await in_thread(loose_parent, data_dir):
        return warning(*describe_loose(parent))
    return ok(f"{data_dir}: a VM's directory there is private, and its lock works")


def _problem(path: Path) -> str:
    """Return the problem of a directory that was just made and locked; empty if it has none."""
    status = path.stat()
    if stat.S_IMODE(status.st_mode) != 0o700:
        mode = stat.S_IMODE(status.st_mode)
        return f"a directory made in {path.parent} has mode {mode:04o} instead of 0700"
    if status.st_uid != os.geteuid():
        return f"a directory made in {path.parent} belongs to user {status.st_uid}, not this user"
    again = VMDirectory(path.parent, path.name)
    if again.try_hold(create=False):
        again.release()
        return f"locks do not work in {path.parent}: one directory was locked twice"
    fd = open_directory(path)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            # A socket's path may have at most 107 bytes; a path through /proc is short.
            listener.bind(f"/proc/self/fd/{fd}/socket")
    except OSError as error:
        return f"cannot make a unix socket in {path.parent}: {error.strerror}"
    finally:
        os.close(fd)
    return ""


async def check_disk(data_dir: Path) -> Verdict:
    """Measure the free disk space, and the time until a written file is on the disk."""
    cure = "Free some space, or pass a directory on another disk as data_dir=."
    try:
        async with scratch(data_dir) as state:
            seconds = await in_thread(_write, state.path / SAMPLE)
            free = shutil.disk_usage(state.path).free
    except OSError as error:
        return blamed(f"cannot write 1 MiB to {data_dir}: {error.strerror}", cure, data_dir)
    found = f"{free / GIB:.1f} GiB are free in {data_dir}; 1 MiB was on disk in {seconds:.3f} s"
    if free < TOO_LITTLE:
        return failed(found, cure)
    if free < LITTLE:
        return warning(f"{found}; a guest can fill its whole virtual disk", cure)
    return ok(found)


def _write(path: Path) -> float:
    started = time.monotonic()
    with path.open("wb") as file:
        file.write(BLOCK)
        file.flush()
        os.fsync(file.fileno())
    return time.monotonic() - started
