"""What QEMU needs of a sidecar."""

from __future__ import annotations

from socket import socket
from typing import NamedTuple

from smolvm_async.process import Child


class Attachment(NamedTuple):
    """A sidecar that runs beside QEMU.

    Attributes:
        argv: The options that attach it to QEMU.
        sockets: QEMU inherits them; they are closed here once QEMU has them.
        child: Its process.
    """

    argv: tuple[str, ...]
    sockets: tuple[socket, ...]
    child: Child
