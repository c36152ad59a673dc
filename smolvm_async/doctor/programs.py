"""Does each program that the library runs, and each kernel feature that it uses, work here?"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
import signal
import struct
import sys
from pathlib import Path
from socket import socket, socketpair

from smolvm_async.doctor.findings import Verdict, failed, ok, warning
from smolvm_async.doctor.probe import DISK, make_disk, scratch
from smolvm_async.errors import CommandError, ImageError
from smolvm_async.foundation.process import run, spawn
from smolvm_async.host.distribution import how_to_install
from smolvm_async.images.local import open_image
from smolvm_async.state.directory import SWTPM_LOG, TPM

QEMU, QEMU_IMG, SWTPM, SETPRIV = "qemu-system-x86_64", "qemu-img", "swtpm", "setpriv"
OLDEST_QEMU = (7, 1)
TESTED_QEMU = "7.2"
ANSWER = 10.0  # seconds

# What `setpriv` has to have set when the program that it becomes runs; prctl(2).
SHOW_SIGNAL = """
import ctypes
signal = ctypes.c_int()
PR_GET_PDEATHSIG = 2
ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(signal))
print(signal.value)
"""

# TPM 2.0 Library, part 3: TPM2_GetRandom of 8 bytes, without a session.
TPM_HEADER = struct.Struct(">HII")
TPM_ST_NO_SESSIONS, TPM_CC_GET_RANDOM = 0x8001, 0x17B
GET_RANDOM = TPM_HEADER.pack(TPM_ST_NO_SESSIONS, 12, TPM_CC_GET_RANDOM) + struct.pack(">H", 8)


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
    if shutil.which(SETPRIV) is None:
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
            await make_disk(Path(QEMU_IMG), state.path)
            with open_image(state.path / DISK):
                pass
        except (CommandError, ImageError) as error:
            return failed(f"qemu-img did not make a qcow2: {error}", _reinstall(QEMU_IMG))
    return ok(f"{version}; it made a qcow2")


async def check_swtpm(data_dir: Path) -> Verdict:
    """Swtpm, by asking it for random bytes."""
    version = await _version(SWTPM)
    if isinstance(version, Verdict):
        return version
    try:
        answer, log = await _ask_swtpm(data_dir)
    except TimeoutError:
        return failed(f"{version} gave no answer within {ANSWER:g} s", _reinstall(SWTPM))
    random = random_bytes(answer)
    if not random:
        said = f"it answered {answer.hex()!r}" if answer else "it gave no answer"
        return failed(f"{version} is no TPM 2.0: {said}.\n{log}", _reinstall(SWTPM))
    return ok(f"{version}; as a TPM 2.0 it gave {len(random)} random bytes")


def random_bytes(answer: bytes) -> bytes:
    """The bytes in an answer to TPM2_GetRandom; empty if it is none, or an error."""
    if len(answer) < TPM_HEADER.size + 2:
        return b""
    tag, size, code = TPM_HEADER.unpack_from(answer)
    if (tag, size, code) != (TPM_ST_NO_SESSIONS, len(answer), 0):
        return b""
    return answer[TPM_HEADER.size + 2 :]


async def _ask_swtpm(data_dir: Path) -> tuple[bytes, str]:
    """What a swtpm on a new TPM answers; empty if it ends instead. And a report of it."""
    async with scratch(data_dir) as state:
        (state.path / TPM).mkdir(0o700)
        ours, theirs = socketpair()
        with ours, theirs:
            ours.setblocking(False)
            options = ["--tpm2", "--tpmstate", f"dir={TPM},mode=0600"]
            channel = ["--fd", str(theirs.fileno()), "--flags", "not-need-init,startup-clear"]
            argv = [SWTPM, "socket", *options, *channel]
            log = state.path / SWTPM_LOG
            child = await spawn(SWTPM, argv, cwd=state.path, log=log, fds=[theirs.fileno()])
            try:
                theirs.close()
                async with asyncio.timeout(ANSWER):
                    answer = await _exchange(ours, GET_RANDOM)
                    if not answer:
                        await asyncio.wait([child.exited])
                return answer, child.report()
            finally:
                await child.reap()


async def _exchange(connection: socket, command: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(connection, command)
        return await loop.sock_recv(connection, 4096)
    except ConnectionError:
        return b""  # it has ended


async def _version(program: str) -> str | Verdict:
    """The first line of what `--version` prints, or why there is none."""
    if shutil.which(program) is None:
        return _missing(program)
    try:
        printed = await run([program, "--version"])
    except CommandError as error:
        return failed(f"{program} does not run: {error}", _reinstall(program))
    first = printed.strip().partition("\n")[0].partition(", Copyright")[0]
    return first or f"{program} (which tells no version)"


def _missing(program: str) -> Verdict:
    path = os.environ.get("PATH", os.defpath)
    return failed(f"{program} not found in PATH ({path})", f"{how_to_install([program])}.")


def _reinstall(program: str) -> str:
    return f"Install {program} afresh. {how_to_install([program])}."
