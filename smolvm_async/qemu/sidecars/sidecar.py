"""The base class of sidecars: the interface that all other modules use."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
        options: The QEMU options that connect the machine to the sidecar.
        sockets: The sockets that QEMU inherits.
    """

    command: list[str]
    own_sockets: tuple[socket, ...]
    options: list[str]
    sockets: tuple[socket, ...]


class Sidecar(ABC):
    """A process that runs beside QEMU from the launch to the end of a VM.

    `launch` spawns it right after QEMU, and it is ready long before QEMU needs it. QEMU and the
    sidecar talk over inherited sockets, so neither waits for a socket file to appear.

    Attributes:
        program: The program, and the packages that contain it. The program's name is also the
            sidecar's name in profiles and messages; the sidecar's log is `NAME.log`.
        directory: The subdirectory of the VM's directory for the sidecar's state, called `NAME`. A
            kept VM keeps it; any other VM loses it when the VM stops. `None` if the sidecar has
            no state. The names of the sidecar's other files must begin with `NAME.`.
        device: The device that the sidecar provides. The doctor's check has the same name.
    """

    program: ClassVar[Program]
    directory: ClassVar[str | None] = None
    device: ClassVar[str]

    @abstractmethod
    def connect(self, program: Path, config: VMConfig) -> Attachment:
        """Make the sockets and the command lines for one run. The caller closes the sockets."""

    @abstractmethod
    async def try_out(self, program: Path, directory: Path) -> str:
        """Run the program without QEMU in an empty directory, and describe the result.

        The doctor calls this. If the program does not work, raise a `CommandError` that has the
        program's log.
        """
