"""Check the qcow2 header of a file before QEMU opens the file, and write an empty overlay.

QEMU's docs/interop/qcow2.txt describes the format; every number is big-endian.

The check protects the host's files. A qcow2 may name a second file: a backing file (its offset is
in bytes 8 to 15), or an external data file (bit 2 of the incompatible features). QEMU also opens
this file, with the rights of the user, and the guest can read it: if the backing file of an image
is /etc/passwd, the image boots, and the guest can read /etc/passwd. So the library reads the header
before QEMU or qemu-img opens the file, and refuses:

- an image that names a backing file or an external data file;
- an encrypted image, an image marked corrupt, and an image with features that this module does not
  know, since an unknown feature may also name a file;
- tables that are out of range or outside the file, and a file that ends before its last cluster
  with a reference count: the guest would boot, and get an I/O error, or zeros, hours later.

The library always tells QEMU the format. If QEMU guessed the format, a guest could turn its raw
disk into a qcow2 that names a file of the host.

A guest writes to an overlay, never to the base image. This module writes the overlay, since
`qemu-img create` takes a fifth of the time of a launch. The overlay's header does not name a
backing file: QEMU gets the base image as an explicit node, by a descriptor. Each VM has its own
overlay: if two QEMUs open a file for writing, the second fails with 'Failed to get "write" lock'.
"""

from __future__ import annotations

import itertools
import os
import struct
from pathlib import Path
from typing import NamedTuple

MAGIC = b"QFI\xfb"
HEADER_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
HEADER_V3 = struct.Struct(">4sIQIIQIIQQIIQQQQII")
DIRTY, CORRUPT, EXTERNAL_DATA_FILE, COMPRESSION_TYPE, EXTENDED_L2 = (1 << bit for bit in range(5))
KNOWN_FEATURES = DIRTY | CORRUPT | EXTERNAL_DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00  # bits 9-55 of an L1, L2 or refcount table entry
ALL_ZEROS, COMPRESSED = 1, 1 << 62  # bits of an L2 table entry
MAX_L1, MAX_REFCOUNT_TABLE = 32 << 20, 8 << 20  # bytes; QEMU's own limits (block/qcow2.h)
MAX_SNAPSHOTS, SNAPSHOT_SIZE = 65536, 40  # entries of the table, and bytes of the smallest entry
MAX_READ = 16 << 20  # bytes of reference counts to read at most
OVERLAY_CLUSTER_BITS = 16

DAMAGED = "; download or copy it again"


class Qcow2Error(ValueError):
    """The file cannot be used. The message continues a sentence that begins with its name."""


class Header(NamedTuple):
    """The fields of a qcow2 header that this module uses; offsets and sizes are in bytes."""

    virtual_size: int
    cluster_bits: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    refcount_order: int
    snapshots: int
    snapshots_offset: int
    features: int

    @property
    def cluster_size(self) -> int:
        """Return the size of a cluster in bytes."""
        return 1 << self.cluster_bits


def check(fd: int) -> Header:
    """Check the header of the open file `fd` and return it; do not write, or open another file.

    If the file is not a qcow2, `kinds` knows more about it.
    """
    size = os.fstat(fd).st_size
    header = parse(os.pread(fd, 512, 0), size)
    _check_tables(header, size)
    _check_length(fd, header, size)
    return header


def first_sector(fd: int) -> bytes | None:
    """Return the first 512 bytes of the disk in a file that has passed `check()`.

    Return `None` if the sector is compressed, or has an extended L2 entry. Then only qemu-img can
    read the sector, which takes as long as the start of QEMU itself.
    """
    header = parse(os.pread(fd, 512, 0), os.fstat(fd).st_size)
    if header.features & EXTENDED_L2:
        return None
    l2_offset = int.from_bytes(os.pread(fd, 8, header.l1_offset), "big") & OFFSET_MASK
    entry = int.from_bytes(os.pread(fd, 8, l2_offset), "big") if l2_offset else 0
    if entry & COMPRESSED:
        return None
    offset = 0 if entry & ALL_ZEROS else entry & OFFSET_MASK
    return (os.pread(fd, 512, offset) if offset else b"").ljust(512, b"\0")


def parse(head: bytes, file_size: int) -> Header:
    """Parse the header in the first 512 bytes of a file of `file_size` bytes."""
    if file_size == 0:
        raise Qcow2Error(f"is empty (0 bytes){DAMAGED}")
    if not head.startswith(MAGIC):
        raise Qcow2Error(
            f"is not a qcow2 image, and begins with {head[:8]!r}; check that it is the right file, "
            "or if it is a raw disk, convert it with qemu-img convert -f raw -O qcow2"
        )
    if len(head) < HEADER_V2.size:
        raise Qcow2Error(
            f"is truncated: a qcow2 header has {HEADER_V2.size} bytes or more" + DAMAGED
        )
    fields = HEADER_V2.unpack_from(head)
    _, version, offset, length, cluster_bits, virtual_size, crypt, l1_entries, l1_offset = fields[
        :9
    ]
    backing = offset and length  # QEMU leaves an empty name when it flattens a disk
    features, refcount_order = 0, 4
    if version == 3:
        if len(head) < HEADER_V3.size:
            raise Qcow2Error(
                f"is truncated: a header of version 3 has {HEADER_V3.size} bytes or more{DAMAGED}"
            )
        features, _, _, refcount_order, header_length = HEADER_V3.unpack_from(head)[13:]
        if not HEADER_V3.size <= header_length <= 1 << min(cluster_bits, 21) or header_length % 8:
            raise _damaged("wrong header length")
    elif version != 2:
        raise Qcow2Error(f"is a qcow2 of version {version}; only 2 and 3 are supported" + DAMAGED)
    _check_features(features, backing, crypt)
    if not 9 <= cluster_bits <= 21 or refcount_order > 6:
        raise _damaged("cluster or refcount size out of range")
    if virtual_size == 0:
        raise Qcow2Error("is a disk of 0 bytes, which cannot contain a system; pass another image")
    return Header(
        virtual_size=virtual_size,
        cluster_bits=cluster_bits,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        refcount_offset=fields[9],
        refcount_clusters=fields[10],
        refcount_order=refcount_order,
        snapshots=fields[11],
        snapshots_offset=fields[12],
        features=features,
    )


def detect_format(path: Path) -> str:
    """Return `qcow2` or `raw`, according to the first bytes of a file."""
    with path.open("rb") as file:
        return "qcow2" if file.read(len(MAGIC)) == MAGIC else "raw"


def _check_features(features: int, backing: int, crypt: int) -> None:
    if backing:
        raise Qcow2Error(
            "has a backing file, which QEMU would open as well; "
            "merge the two files with qemu-img convert -O qcow2, and pass the result"
        )
    if features & EXTERNAL_DATA_FILE:
        raise Qcow2Error(
            "keeps its data in an external data file, which QEMU would open as well; "
            "merge the two files with qemu-img convert -O qcow2, and pass the result"
        )
    if crypt:
        raise Qcow2Error(
            "is encrypted; decrypt it with qemu-img convert --object secret,id=key,file=PASSPHRASE "
            "--image-opts driver=qcow2,encrypt.key-secret=key,file.filename=FILE -O qcow2 NEW_FILE "
            "(each word in capitals is a file's path), and pass the new file"
        )
    if features & CORRUPT:
        raise Qcow2Error("is marked corrupt; repair it with qemu-img check -r all")
    if unknown := features & ~KNOWN_FEATURES:
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        raise Qcow2Error(
            "needs qcow2 features that this library does not know "
            f"(incompatible feature bits {bits}); "
            "convert it with qemu-img convert -O qcow2, and pass the result"
        )


def _check_tables(header: Header, file_size: int) -> None:
    l2_bits = header.cluster_bits - (4 if header.features & EXTENDED_L2 else 3)
    needed = -(-header.virtual_size >> (header.cluster_bits + l2_bits))
    if header.l1_entries < needed or header.l1_entries * 8 > MAX_L1:
        raise _damaged("the L1 table does not fit the disk's size")
    if not 0 < header.refcount_clusters << header.cluster_bits <= MAX_REFCOUNT_TABLE:
        raise _damaged("the refcount table is too large, or missing")
    if _l1_entries(header.virtual_size, OVERLAY_CLUSTER_BITS) * 8 > MAX_L1:
        raise Qcow2Error("is a disk of over 2 PiB, too large for an overlay; use a smaller disk")
    if header.snapshots > MAX_SNAPSHOTS:
        raise _damaged("too many snapshots")
    snapshots = [(header.snapshots_offset, header.snapshots * SNAPSHOT_SIZE)]
    for offset, length in (
        *(snapshots if header.snapshots else ()),
        (header.l1_offset, header.l1_entries * 8),
        (header.refcount_offset, header.refcount_clusters << header.cluster_bits),
    ):
        if offset == 0 or offset % header.cluster_size:
            raise _damaged("a table is missing, or does not begin on a cluster boundary")
        if offset + length > file_size:
            raise _truncated(offset + length, file_size)


def _check_length(fd: int, header: Header, file_size: int) -> None:
    """Refuse a file that ends before the last cluster with a reference count.

    Read the counts backwards from the end: the first count that is not 0 belongs to the last
    used cluster. If the image is marked dirty, the counts on disk may be older than the data, and a
    missing end may stay unnoticed.
    """
    length = header.refcount_clusters << header.cluster_bits
    table = os.pread(fd, length, header.refcount_offset).rstrip(b"\0")
    bits = 1 << header.refcount_order
    per_block = header.cluster_size * 8 // bits
    blocks = range((len(table) - 1) // 8, -1, -1)
    for index in itertools.islice(blocks, MAX_READ // header.cluster_size):
        entry = table[index * 8 : index * 8 + 8].ljust(8, b"\0")
        offset = int.from_bytes(entry, "big") & OFFSET_MASK
        if offset + header.cluster_size > file_size:
            raise _truncated(offset + header.cluster_size, file_size)
        counts = os.pread(fd, header.cluster_size, offset).rstrip(b"\0") if offset else b""
        if counts:
            last_bit = len(counts) * 8 - 9 + counts[-1].bit_length()
            last = index * per_block + last_bit // bits
            if last << header.cluster_bits >= file_size:
                raise _truncated((last << header.cluster_bits) + 1, file_size)
            return


def _l1_entries(virtual_size: int, cluster_bits: int) -> int:
    return -(-virtual_size >> (2 * cluster_bits - 3))


def _damaged(reason: str) -> Qcow2Error:
    return Qcow2Error(f"has a damaged qcow2 header ({reason}){DAMAGED}")


def _truncated(expected: int, actual: int) -> Qcow2Error:
    return Qcow2Error(
        f"is truncated: it has {actual} bytes, but its header needs at least {expected}; "
        "download or copy it again. If qemu-img check finds no errors, "
        "rewrite the file with qemu-img convert -O qcow2"
    )


def empty(virtual_size: int) -> bytes:
    """Return the bytes of an empty qcow2 whose disk has `virtual_size` bytes.

    Layout: header, refcount table, refcount blocks, L1 table; each part begins on a new cluster.
    """
    cluster_bits = OVERLAY_CLUSTER_BITS
    cluster = 1 << cluster_bits
    l1_entries = _l1_entries(virtual_size, cluster_bits)
    l1_clusters = max(1, -(-l1_entries * 8 >> cluster_bits))
    per_block = cluster // 2  # 16-bit reference counts
    blocks = 1
    while 2 + blocks + l1_clusters > blocks * per_block:
        blocks += 1
    clusters = 2 + blocks + l1_clusters
    l1_offset = (2 + blocks) << cluster_bits
    header = HEADER_V3.pack(
        *(MAGIC, 3, 0, 0, cluster_bits, virtual_size, 0, l1_entries, l1_offset),
        *(cluster, 1, 0, 0, 0, 0, 0, 4, HEADER_V3.size),
    )
    table = struct.pack(f">{blocks}Q", *((2 + block) << cluster_bits for block in range(blocks)))
    counts = b"\0\1" * clusters
    return b"".join(
        (
            header.ljust(cluster, b"\0"),
            table.ljust(cluster, b"\0"),
            counts.ljust(blocks * cluster, b"\0"),
            bytes(l1_clusters * cluster),
        )
    )
