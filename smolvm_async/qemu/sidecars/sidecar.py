"""The base class of sidecars: everything that the other modules have to know of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import ClassVar, NamedTuple

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.host.distribution import Program


class Attachment(NamedTuple):
    """The two sides of the connection between a sidecar and QEMU.

    Attributes:
        command: The sidecar's command line. The VM's directory is its working directory.
        own_sockets: The sockets that the sidecar inherits.
        options: The options of QEMU's machine that use the sidecar.
        sockets: The sockets that QEMU inherits.
    """

    command: list[str]
    own_sockets: tuple[socket, ...]
    options: list[str]
    sockets: tuple[socket, ...]


class Sidecar(ABC):
    """A process that runs beside QEMU from the launch to the end of a VM.

    It is spawned right after QEMU and is ready long before QEMU needs it. QEMU and the sidecar
    reach each other over inherited sockets, so neither waits for a file to appear.

    Attributes:
        program: The program, and the packages that have it. Its name is the sidecar's, too: in the
            profiles of guests, in messages, and of its log, `NAME.log` in the VM's directory.
        directory: The directory in the VM's own in which the sidecar keeps the state of a kept VM,
            which is removed with an unkept VM's secrets. It is `NAME`, or None if there is no such
            state. All its other files in the VM's directory must begin with `NAME.`.
        device: The device that it gives the guest, as a check of the doctor is named.
    """

    program: ClassVar[Program]
    directory: ClassVar[str | None] = None
    device: ClassVar[str]

    @abstractmethod
    def connect(self, program: Path, config: VMConfig) -> Attachment:
        """Make the sockets and the command lines for one run of a VM.

        Raises:
            OSError: There are no descriptors left.
        """

    @contextmanager
    def open(self, program: Path, config: VMConfig) -> Iterator[Attachment]:
        """Connect for the time of the block, in which QEMU and the sidecar are spawned.

        All sockets are closed at its end: QEMU does not see the end of a sidecar, nor a sidecar
        that of QEMU, while this process has a copy of the other's socket.
        """
        attachment = self.connect(program, config)
        try:
            yield attachment
        finally:
            for end in (*attachment.own_sockets, *attachment.sockets):
                end.close()

    @abstractmethod
    async def try_out(self, program: Path, directory: Path) -> str:
        """Run the program without QEMU and return a few words on what it did, for the doctor.

        Args:
            program: The program.
            directory: An empty directory to run it in.

        Raises:
            CommandError: It does not work; with its log.
            LaunchError: It cannot be started.
        """
