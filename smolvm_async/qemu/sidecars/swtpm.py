"""swtpm: a TPM 2.0 in software, connected to QEMU by a socketpair."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from socket import socket, socketpair

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import CommandError
from smolvm_async.foundation.process import spawn
from smolvm_async.host.distribution import Program
from smolvm_async.qemu.sidecars.sidecar import Attachment, Sidecar
from smolvm_async.state.names import TPM, log_name

SOCKET = ("socket", "--tpm2", "--tpmstate", f"dir={TPM},mode=0600")

ANSWER = 10.0  # seconds that the doctor waits for an answer

# TPM 2.0 Library, part 3: TPM2_GetRandom of 8 bytes, without a session.
HEADER = struct.Struct(">HII")
NO_SESSIONS, CC_GET_RANDOM = 0x8001, 0x17B  # TPM_ST_NO_SESSIONS, TPM_CC_GetRandom
GET_RANDOM = HEADER.pack(NO_SESSIONS, 12, CC_GET_RANDOM) + struct.pack(">H", 8)


class Swtpm(Sidecar):
    """The guest's TPM. Its state is in the VM's directory."""

    program = Program("swtpm", apt="swtpm", dnf="swtpm", pacman="swtpm", brew="swtpm")
    directory = TPM
    device = "tpm"

    def connect(self, program: Path, config: VMConfig) -> Attachment:
        """Make the socketpair of the control channel. QEMU sends the data channel through it."""
        ours, qemus = socketpair()
        return Attachment(
            command=[
                str(program),
                *SOCKET,
                *("--ctrl", f"type=unixio,clientfd={ours.fileno()}"),
                "--terminate",  # swtpm ends when QEMU's end of the socketpair closes
            ],
            own_sockets=(ours,),
            options=[
                *("-chardev", f"socket,id=tpm,fd={qemus.fileno()}"),
                *("-tpmdev", "emulator,id=tpm0,chardev=tpm"),
                *("-device", "tpm-crb,tpmdev=tpm0"),
            ],
            sockets=(qemus,),
        )

    async def try_out(self, program: Path, directory: Path) -> str:
        """Ask a new TPM for random bytes."""
        name = self.program.name
        (directory / TPM).mkdir(0o700)
        ours, theirs = socketpair()
        with ours, theirs:
            ours.setblocking(False)
            fd = theirs.fileno()
            channel = ("--fd", str(fd), "--flags", "not-need-init,startup-clear")
            argv = [str(program), *SOCKET, *channel]
            log = directory / log_name(name)
            child = await spawn(name, argv, cwd=directory, log=log, fds=[fd])
            try:
                theirs.close()
                async with asyncio.timeout(ANSWER):
                    answer = await _exchange(ours, GET_RANDOM)
                    if not answer:
                        await asyncio.wait([child.exited])
            except TimeoutError:
                raise CommandError(f"{name} did not answer within {ANSWER:g} s") from None
            finally:
                await child.reap()
        random = random_bytes(answer)
        if not random:
            said = f"answered {answer.hex()!r}" if answer else "did not answer"
            raise CommandError(
                f"{name} does not work as a TPM 2.0: {name} {said}.\n{child.report()}"
            )
        return f"it works as a TPM 2.0 and returned {len(random)} random bytes"


async def _exchange(connection: socket, command: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(connection, command)
        return await loop.sock_recv(connection, 4096)
    except ConnectionError:
        return b""  # swtpm has ended


def random_bytes(answer: bytes) -> bytes:
    """Return the random bytes in an answer to TPM2_GetRandom; empty if the answer is not valid."""
    if len(answer) < HEADER.size + 2:
        return b""
    tag, size, code = HEADER.unpack_from(answer)
    if (tag, size, code) != (NO_SESSIONS, len(answer), 0):
        return b""
    return answer[HEADER.size + 2 :]


SIDECAR = Swtpm()
