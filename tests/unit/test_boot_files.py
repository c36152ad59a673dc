"""Kernels of Debian and Ubuntu: their packages, and the formats of compression."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolvm_async.images.build.boot_files import KERNEL_PACKAGE, decompress_kernel
from smolvm_async.images.build.decompression import LZ4_LEGACY, decompress

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CONTENT = b"\x7fELF" + bytes(range(256)) * 300


# The dependencies that apt-cache lists, and those of them that have files of the kernel.
LAYOUTS = {
    "debian 12": (
        "linux-image-cloud-amd64 linux-image-6.1.0-57-cloud-amd64 linux-base initramfs-tools kmod",
        "linux-image-6.1.0-57-cloud-amd64",
    ),
    "debian 13 with backports": (
        "linux-image-cloud-amd64 linux-base-cloud-amd64 linux-modules-cloud-amd64 dracut kmod "
        "linux-image-7.3.4+deb13-cloud-amd64 linux-base-7.3.4+deb13-cloud-amd64 "
        "linux-binary-7.3.4+deb13-cloud-amd64 linux-modules-7.3.4+deb13-cloud-amd64",
        "linux-image-7.3.4+deb13-cloud-amd64 linux-base-7.3.4+deb13-cloud-amd64 "
        "linux-binary-7.3.4+deb13-cloud-amd64 linux-modules-7.3.4+deb13-cloud-amd64",
    ),
    "ubuntu 24.04": (
        "linux-image-virtual linux-image-6.8.0-31-generic linux-modules-6.8.0-31-generic kmod "
        "linux-modules-extra-6.8.0-31-generic linux-firmware linux-base wireless-regdb",
        "linux-image-6.8.0-31-generic linux-modules-6.8.0-31-generic",
    ),
}


@pytest.mark.parametrize(("needed", "kernel"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_packages_of_a_kernel(needed: str, kernel: str) -> None:
    assert list(filter(KERNEL_PACKAGE.match, needed.split())) == kernel.split()


def lz4_block(*sequences: tuple[bytes, int, int], end: bytes = b"") -> bytes:
    """Encode literals, each followed by a copy of so many bytes from so far back."""

    def nibble(value: int) -> int:
        return min(value, 15)

    def more(value: int) -> bytes:
        return b"" if value < 15 else b"\xff" * ((value - 15) // 255) + bytes([(value - 15) % 255])

    block = b""
    for literals, offset, copied in sequences:
        block += bytes([nibble(len(literals)) << 4 | nibble(copied - 4)])
        block += more(len(literals)) + literals + struct.pack("<H", offset) + more(copied - 4)
    return block + bytes([nibble(len(end)) << 4]) + more(len(end)) + end


def lz4(*blocks: bytes) -> bytes:
    return LZ4_LEGACY + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


@pytest.mark.parametrize(
    "compressed",
    [
        lzma.compress(CONTENT),
        lzma.compress(CONTENT, lzma.FORMAT_ALONE),
        gzip.compress(CONTENT),
        bz2.compress(CONTENT),
        zstd.compress(CONTENT),
        lz4(lz4_block((CONTENT[:260], 256, len(CONTENT) - 260))),
        lz4(lz4_block(end=CONTENT[:7000]), lz4_block(end=CONTENT[7000:])),
    ],
    ids=["xz", "lzma", "gzip", "bzip2", "zstd", "lz4", "lz4 of two blocks"],
)
def test_a_kernel_is_decompressed(compressed: bytes) -> None:
    size = struct.pack("<I", len(CONTENT))  # follows the compressed kernel
    header = bytearray(1024)
    header[0x1F1], header[0x202:0x206] = 1, b"HdrS"
    struct.pack_into("<II", header, 0x248, 100, len(compressed) + len(size))
    bzimage = bytes(header) + bytes(100) + compressed + size + bytes(50)
    assert decompress_kernel(bzimage) == CONTENT


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=700), st.integers(4, 700)), max_size=6))
def test_lz4_copies_what_came_before(parts: list[tuple[bytes, int]]) -> None:
    expected, sequences = b"", []
    for literals, copied in parts:
        expected += literals
        offset = len(literals)
        sequences.append((literals, offset, copied))
        expected += (literals * (copied // offset + 1))[:copied]
    assert decompress(lz4(lz4_block(*sequences, end=b"end"))) == expected + b"end"


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x7fELF", b"\xfd7zXZ damaged", b"\x1f\x8bdamaged", b"BZh?", b"\x5d\0\0damaged"),
        *(b"\x28\xb5\x2f\xfddamaged", lz4(b"\xff"), lz4(bytes(3)), lz4(b"\x00\x09\x00\x00")),
    ],
)
def test_what_is_not_compressed_or_damaged_gives_nothing(data: bytes) -> None:
    assert decompress(data) == b""
