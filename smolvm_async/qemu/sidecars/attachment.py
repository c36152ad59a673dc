"""A process that runs beside QEMU, and what QEMU needs of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket
from typing import NamedTuple


class Attachment(NamedTuple):
    """A sidecar that is to be spawned right after QEMU: it is ready long before QEMU needs it.

    Attributes:
        name: What messages call it.
        command: Its command line.
        log: The name of its log in the VM's directory.
        own_sockets: It inherits them.
        argv: The options that attach it to QEMU.
        sockets: QEMU inherits them.
    """

    name: str
    command: tuple[str, ...]
    log: str
    own_sockets: tuple[socket, ...]
    argv: tuple[str, ...]
    sockets: tuple[socket, ...]

    @contextmanager
    def open(self) -> Iterator[Attachment]:
        """Close all sockets at the end: an end that were open here would never show as closed."""
        try:
            yield self
        finally:
            for end in (*self.own_sockets, *self.sockets):
                end.close()
