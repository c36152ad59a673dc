"""Decompress the kernels and kernel modules of Debian and Ubuntu, without a program of the host."""

from __future__ import annotations

import bz2
import lzma
import struct
import sys
import zlib
from collections.abc import Callable

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DAMAGED = (lzma.LZMAError, zlib.error, zstd.ZstdError, OSError, ArithmeticError, IndexError)
LZ4_LEGACY = b"\x02\x21\x4c\x18"


def decompress(data: bytes) -> bytes:
    """Return the content of compressed data, which may have other bytes after its end.

    Return `b""` for an unknown or damaged format.
    """
    for magic, decompressor in FORMATS.items():
        if data.startswith(magic):
            try:
                return decompressor(data)
            except DAMAGED:
                return b""
    return b""


def _lz4_legacy(data: bytes) -> bytes:
    """Decompress the format of `lz4 -l`, which only kernels use: blocks with their lengths.

    A kernel's size follows the last block. Python decompresses a kernel of 50 MB in a second, once
    for each image, so a package with LZ4 in C would not be worth its installation.
    """
    content = bytearray()
    at = len(LZ4_LEGACY)
    while at + 4 < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        content += _lz4_block(data[at : at + length])
        at += length
    return bytes(content)


def _lz4_block(block: bytes) -> bytearray:
    """Decompress a block: literals and copies of earlier output in turns; literals at the end."""
    content = bytearray()
    at = 0

    def length(nibble: int) -> int:
        nonlocal at
        total = nibble
        more = 255 if nibble == 15 else 0
        while more == 255:
            more = block[at]
            total += more
            at += 1
        return total

    while True:
        token = block[at]
        at += 1
        literals = length(token >> 4)
        content += block[at : at + literals]
        at += literals
        if at >= len(block):
            return content
        offset = block[at] | block[at + 1] << 8
        at += 2
        copied = length(token & 15) + 4
        begin = len(content) - offset
        earlier = content[begin : begin + copied]
        if offset < copied:  # the copy overlaps itself: it repeats these bytes
            earlier = (earlier * (copied // offset + 1))[:copied]
        content += earlier


FORMATS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\xfd7zXZ": lambda data: lzma.LZMADecompressor().decompress(data),
    b"\x1f\x8b": lambda data: zlib.decompressobj(wbits=31).decompress(data),
    b"\x28\xb5\x2f\xfd": lambda data: zstd.ZstdDecompressor().decompress(data),
    b"BZh": lambda data: bz2.BZ2Decompressor().decompress(data),
    b"\x5d\0\0": lambda data: lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data),
    LZ4_LEGACY: _lz4_legacy,
}
