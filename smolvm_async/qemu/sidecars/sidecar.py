"""The base class of sidecars: everything that other modules ask a sidecar for."""

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
        program: The program, and the packages that have it. The name of the program is also the
            name of the sidecar: in profiles and messages, and of its log, `NAME.log`.
        directory: The subdirectory of the VM's directory for the sidecar's state, called `NAME`. A
            kept VM keeps it; otherwise it is removed when the VM stops. `None` if there is no
            state. All other files of the sidecar must begin with `NAME.`.
        device: The device that the sidecar provides; also the name of a check of the doctor.
    """

    program: ClassVar[Program]
    directory: ClassVar[str | None] = None
    device: ClassVar[str]

    @abstractmethod
    def connect(self, program: Path, config: VMConfig) -> Attachment:
        """Make the sockets and the command lines for one run. The caller closes the sockets."""

    @abstractmethod
    async def try_out(self, program: Path, directory: Path) -> str:
        """Run the program in an empty directory, without QEMU, for the doctor.

        Return a few words on the result. A `CommandError` has the log of a program that does not
        work.
        """
