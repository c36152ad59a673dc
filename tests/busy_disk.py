"""A guest of 512 bytes: a boot sector that reads or writes its disk for ever, block after block.

The guest reports each access on its serial console: `.` if it succeeded, `E` if it failed. A BIOS
boots the guest within a second under TCG.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Literal

ORIGIN = 0x7C00  # the BIOS loads the boot sector to this address
BUFFER = 0x7E00  # where the guest reads to; it writes itself, since QEMU stores no zeroes
COM1 = 0x3F8
STEP = 128  # sectors between two accesses: each access needs another cluster of the qcow2
READ, WRITE = 0x42, 0x43  # the extended functions of the BIOS's int 13h


def boot_sector(access: Literal["read", "write"]) -> bytes:
    """Return the boot sector."""
    start = bytes.fromhex("31c0 8ed8 8ed0 bc007c fb")  # ds = ss = 0, sp = ORIGIN, sti
    function = READ if access == "read" else WRITE

    def body(packet: int) -> bytes:
        at = struct.Struct("<H").pack
        return b"".join((
            b"\xc7\x06" + at(packet + 2) + at(1),  # mov word [packet + 2], 1: an error clears it
            b"\xbe" + at(packet),  # mov si, packet
            bytes((0xB4, function, 0xB0, 0x00)),  # mov ah, function; mov al, 0
            bytes.fromhex("52 cd13 5a"),  # push dx; int 13h; pop dx
            b"\xb0.\x73\x02\xb0E",  # mov al, '.'; jnc over; mov al, 'E'
            b"\x52\xba" + at(COM1) + b"\xee\x5a",  # push dx; mov dx, COM1; out dx, al; pop dx
            b"\x81\x06" + at(packet + 8) + at(STEP),  # add word [packet + 8], STEP
            b"\x83\x16" + at(packet + 10) + b"\x00",  # adc word [packet + 10], 0
            b"\xf4",  # hlt: until the timer's next tick, 18 times a second
        ))  # fmt: skip

    length = len(body(0))
    packet = ORIGIN + len(start) + length + 2
    jump = b"\xeb" + struct.pack("b", -length - 2)
    memory = BUFFER if access == "read" else ORIGIN
    where = struct.pack("<BBHHHQ", 16, 0, 1, memory, 0, STEP)
    return (start + body(packet) + jump + where).ljust(510, b"\0") + b"\x55\xaa"


def busy_disk(path: Path, access: Literal["read", "write"], size: int = 256 << 20) -> Path:
    """Make a qcow2 with the guest in it; the rest of the disk has content, for a reading guest."""
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        file.write(boot_sector(access))
        if access == "read":
            for block in range(STEP * 512, size, STEP * 512):
                file.seek(block)
                file.write(b"content of a block")
        file.truncate(size)
    words = ["convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)]
    subprocess.run(["qemu-img", *words], check=True)
    raw.unlink()
    return path
