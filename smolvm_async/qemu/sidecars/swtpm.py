"""swtpm: a TPM 2.0 in software, on a socketpair shared with QEMU."""

from __future__ import annotations

from socket import socketpair

from smolvm_async.host import HostTools
from smolvm_async.qemu.sidecars.attachment import Attachment
from smolvm_async.state.directory import SWTPM_LOG, TPM


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


def swtpm(tools: HostTools) -> Attachment:
    """A TPM whose state is in the VM's directory."""
    ours, qemus = socketpair()
    return Attachment(
        "swtpm",
        tuple(swtpm_arguments(tools, ours.fileno())),
        SWTPM_LOG,
        (ours,),
        tuple(attach_arguments(qemus.fileno())),
        (qemus,),
    )
