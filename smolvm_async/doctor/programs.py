"""Does each program that the library runs, and each kernel feature that it uses, work here?"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import sys
from pathlib import Path

from smolvm_async.doctor.findings import Verdict, failed, ok, warning
from smolvm_async.doctor.probe import DISK, make_disk, scratch
from smolvm_async.errors import CommandError, ImageError
from smolvm_async.foundation.process import run
from smolvm_async.host.distribution import QEMU, QEMU_IMG, SETPRIV, Program, how_to_install
from smolvm_async.images.local import open_image
from smolvm_async.qemu.sidecars import Sidecar

OLDEST_QEMU = (7, 1)
TESTED_QEMU = "7.2"

# What `setpriv` has to have set when the program that it becomes runs; prctl(2).
SHOW_SIGNAL = """
import ctypes
signal = ctypes.c_int()
PR_GET_PDEATHSIG = 2
ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(signal))
print(signal.value)
"""


async def check_kernel() -> Verdict:
    """A pidfd, which the event loop watches children by."""
    release = platform.release()
    try:
        fd = os.pidfd_open(os.getpid())
        try:
            signal.pidfd_send_signal(fd, 0)
        finally:
            os.close(fd)
    except OSError as error:
        return failed(
            f"Linux {release}: pidfd_open(2) does not work: {error.strerror}",
            "Use Linux 5.3 or newer; in a container, a seccomp profile that allows pidfd_open.",
        )
    return ok(f"Linux {release}; pidfd works")


async def check_python() -> Verdict:
    """Which Python runs."""
    return ok(f"Python {platform.python_version()} ({sys.executable})")


async def check_setpriv() -> Verdict:
    """The parent-death signal, without which a SIGKILL of Python would leave QEMU running."""
    if shutil.which(SETPRIV.name) is None:
        return _missing(SETPRIV)
    cure = f"Use util-linux 2.33 or newer. {how_to_install([SETPRIV])}."
    try:  # `run` puts `setpriv --pdeathsig KILL --` in front
        shown = (await run([sys.executable, "-I", "-S", "-c", SHOW_SIGNAL])).strip()
    except CommandError as error:
        return failed(f"setpriv --pdeathsig does not work: {error}", cure)
    if shown != str(int(signal.SIGKILL)):
        return failed(f"setpriv --pdeathsig KILL had no effect: prctl(2) shows {shown!r}", cure)
    return ok("setpriv sets the parent-death signal: no process outlives its owner")


async def check_qemu() -> Verdict:
    """QEMU's version; the firmware probe shows whether it works."""
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
    """qemu-img, by making a disk and looking at it."""
    version = await _version(QEMU_IMG)
    if isinstance(version, Verdict):
        return version
    async with scratch(data_dir) as state:
        try:
            await make_disk(Path(QEMU_IMG.name), state.path)
            with open_image(state.path / DISK):
                pass
        except (CommandError, ImageError) as error:
            return failed(f"qemu-img did not make a qcow2: {error}", _reinstall(QEMU_IMG))
    return ok(f"{version}; it made a qcow2")


async def check_sidecar(sidecar: Sidecar, data_dir: Path) -> Verdict:
    """Check that a sidecar's program works without QEMU."""
    version = await _version(sidecar.program)
    if isinstance(version, Verdict):
        return version
    async with scratch(data_dir) as state:
        try:
            shown = await sidecar.try_out(Path(sidecar.program.name), state.path)
        except CommandError as error:
            return failed(f"{version} does not work: {error}", _reinstall(sidecar.program))
    return ok(f"{version}; {shown}")


async def _version(program: Program) -> str | Verdict:
    """The first line of what `--version` prints, or why there is none."""
    if shutil.which(program.name) is None:
        return _missing(program)
    try:
        printed = await run([program.name, "--version"])
    except CommandError as error:
        return failed(f"{program.name} does not run: {error}", _reinstall(program))
    first = printed.strip().partition("\n")[0].partition(", Copyright")[0]
    return first or f"{program.name} (which tells no version)"


def _missing(program: Program) -> Verdict:
    path = os.environ.get("PATH", os.defpath)
    return failed(f"{program.name} not found in PATH ({path})", f"{how_to_install([program])}.")


def _reinstall(program: Program) -> str:
    return f"Install {program.name} afresh. {how_to_install([program])}."
