"""A kernel as QEMU starts it soonest: uncompressed, entered by its PVH note.

Under TCG the guest would take half a second to decompress it; done here, once, it takes none.
"""

from __future__ import annotations

import lzma
import struct
import zlib

ELF = b"\x7fELF"


def uncompressed(bzimage: bytes) -> bytes:
    """The vmlinux in a bzImage (Documentation/arch/x86/boot.rst), or what was passed."""
    if bzimage[0x202:0x206] != b"HdrS":
        return bzimage
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    begin = (setup_sectors + 1) * 512 + offset
    payload = bzimage[begin : begin + length]
    try:
        vmlinux = _decompress(payload)
    except (lzma.LZMAError, zlib.error):
        return bzimage
    return vmlinux if vmlinux.startswith(ELF) else bzimage


def _decompress(payload: bytes) -> bytes:
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(payload)
    return b""  # zstd, lz4: the standard library knows neither
