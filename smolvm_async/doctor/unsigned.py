"""Make the bytes of a disk that a firmware with Secure Boot refuses to boot.

The disk has a FAT12 file system without partitions, with an unsigned EFI application on it. The
application uses no service of the firmware. It writes a line to the first serial port and returns
EFI_NOT_FOUND, so the firmware tries the next boot entry.
"""

from __future__ import annotations

import struct

MARKER = "SMOLVM-UNSIGNED-RAN"

SECTOR = 512
COM1 = 0x3F8
EFI_NOT_FOUND = 0x8000_0000_0000_000E
SECTIONS_BASE = 0x1000  # the address of the code in memory, and the alignment of sections

# The layout of a floppy disk, with one sector per cluster.
SECTORS, FAT_SECTORS, ROOT_ENTRIES = 2880, 9, 224
HARD_DISK, END_OF_CHAIN, DIRECTORY, ARCHIVE = 0xF8, 0xFFF, 0x10, 0x20


def unsigned_application() -> bytes:
    """Return the application: a PE32+ file with a code section and an empty .reloc section."""
    code = _machine_code().ljust(SECTOR, b"\0")
    relocations = struct.pack("<IIHH", SECTIONS_BASE, 12, 0, 0).ljust(SECTOR, b"\0")
    dos = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)
    # x86-64, 2 sections, 240 bytes of optional header, executable and large-address-aware
    coff = struct.pack("<HHIIIHH", 0x8664, 2, 0, 0, 0, 240, 0x22)
    optional = struct.pack("<HBBIIIII", 0x20B, 0, 0, SECTOR, SECTOR, 0, SECTIONS_BASE, 0x1000)
    optional += struct.pack(
        "<QIIHHHHHHIIIIHHQQQQII",
        *(0x400000, SECTIONS_BASE, SECTOR, 0, 0, 0, 0, 0, 0, 0),
        *(0x3000, SECTOR, 0, 10, 0),  # sizes in memory and of headers; 10: EFI application
        *(0x10000, 0x10000, 0x10000, 0x10000, 0, 16),
    )
    directories = [b"\0" * 8] * 16
    directories[5] = struct.pack("<II", 2 * SECTIONS_BASE, 12)  # base relocations
    sections = struct.pack(
        "<8sIIIIIIHHI", b".text", SECTOR, SECTIONS_BASE, SECTOR, SECTOR, 0, 0, 0, 0, 0x60000020
    ) + struct.pack(
        "<8sIIIIIIHHI", b".reloc", 12, 2 * SECTIONS_BASE, SECTOR, 1024, 0, 0, 0, 0, 0x42000040
    )
    headers = dos + b"PE\0\0" + coff + optional + b"".join(directories) + sections
    return headers.ljust(SECTOR, b"\0") + code + relocations


def _machine_code() -> bytes:
    port = b"\x66\xba" + struct.pack("<H", COM1)  # mov dx, COM1
    write = b"".join(b"\xb0%c\xee" % byte for byte in f"{MARKER}\r\n".encode())  # mov al; out dx
    leave = b"\x48\xb8" + struct.pack("<Q", EFI_NOT_FOUND) + b"\xc3"  # mov rax; ret
    return port + write + leave


def unsigned_disk() -> bytes:
    """Return a raw disk with the application at the default path, `/EFI/BOOT/BOOTX64.EFI`.

    Its clusters hold `/EFI`, then `/EFI/BOOT`, then the file.
    """
    content = unsigned_application()
    boot = struct.pack(
        "<3s8sHBHBHHBHHHII", b"\xeb\x3c\x90", b"SMOLVM  ", SECTOR, 1, 1, 2, ROOT_ENTRIES, SECTORS,
        *(HARD_DISK, FAT_SECTORS, 18, 2, 0, 0),
    ) + struct.pack("<BBBI11s8s", 0x80, 0, 0x29, 0, b"SMOLVM     ", b"FAT12   ")  # fmt: skip
    clusters = -(-len(content) // SECTOR)
    chain = [0xF00 | HARD_DISK, *[END_OF_CHAIN] * 3, *range(5, 4 + clusters), END_OF_CHAIN]
    table = sum(entry << 12 * number for number, entry in enumerate(chain))
    fat = table.to_bytes(FAT_SECTORS * SECTOR, "little")
    root = _entry("EFI", DIRECTORY, 2)
    efi = _entry(".", DIRECTORY, 2) + _entry("..", DIRECTORY, 0) + _entry("BOOT", DIRECTORY, 3)
    file = _entry("BOOTX64 EFI", ARCHIVE, 4, len(content))
    directory = _entry(".", DIRECTORY, 3) + _entry("..", DIRECTORY, 2) + file
    return b"".join(
        (
            boot.ljust(SECTOR - 2, b"\0") + b"\x55\xaa",
            fat * 2,
            root.ljust(ROOT_ENTRIES * 32, b"\0"),
            efi.ljust(SECTOR, b"\0"),
            directory.ljust(SECTOR, b"\0"),
            content,
        )
    ).ljust(SECTORS * SECTOR, b"\0")


def _entry(name: str, attributes: int, cluster: int, size: int = 0) -> bytes:
    epoch = 0x21  # 1980-01-01
    padded = name.ljust(11).encode()
    return struct.pack("<11sB10xHHHI", padded, attributes, 0, epoch, cluster, size)
