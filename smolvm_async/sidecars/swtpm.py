"""swtpm: a TPM 2.0 in software, on a socketpair shared with QEMU."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from socket import socketpair

from smolvm_async.host import HostTools
from smolvm_async.process import spawn
from smolvm_async.sidecars.attachment import Attachment
from smolvm_async.state import SWTPM_LOG, TPM, StateDirectory


def swtpm_arguments(tools: HostTools, fd: int) -> list[str]:
    """The command line; `fd` is its end of the socketpair."""
    return [
        str(tools.swtpm),
        "socket",
        "--tpm2",
        *("--tpmstate", f"dir={TPM},mode=0600"),
        *("--ctrl", f"type=unixio,clientfd={fd}"),
        "--terminate",  # when QEMU's end closes
    ]


def attach_arguments(fd: int) -> list[str]:
    """QEMU's options for it; `fd` is QEMU's end of the socketpair."""
    return [
        *("-chardev", f"socket,id=tpm,fd={fd}"),
        *("-tpmdev", "emulator,id=tpm0,chardev=tpm"),
        *("-device", "tpm-crb,tpmdev=tpm0"),
    ]


@asynccontextmanager
async def swtpm(tools: HostTools, state: StateDirectory) -> AsyncIterator[Attachment]:
    """Run swtpm on the VM's TPM directory; it is killed and reaped at the end.

    Raises:
        LaunchError: If it cannot be spawned.
    """
    ours, qemus = socketpair()
    with ours, qemus:
        argv = swtpm_arguments(tools, ours.fileno())
        log = state.path / SWTPM_LOG
        child = await spawn("swtpm", argv, cwd=state.path, log=log, fds=(ours.fileno(),))
        ours.close()  # or a dead swtpm would never show as the end of QEMU's connection
        try:
            yield Attachment(tuple(attach_arguments(qemus.fileno())), (qemus,), child)
        finally:
            await child.reap()
