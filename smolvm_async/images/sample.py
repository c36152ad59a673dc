"""The parts of a file by which `kinds` recognizes it, and the names in an archive.

Nothing in a file is trusted: a bounded part of it is read, every number is checked before its use,
and no program or library parses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

HEAD = 66 << 10  # bytes; the last signature, of btrfs, is at 64 KiB
TAIL = 512  # bytes; a VHD and a DMG end with a footer of this length
TEXT = 16 << 10  # bytes of a text; the title of a web page is near its beginning
MEMBERS = 100  # members of an archive to look at


class Sample(NamedTuple):
    """The parts of a file that signatures look at."""

    name: str  # the file's path, for commands
    size: int
    head: bytes
    tail: bytes
    text: str  # the beginning, without white space before it; empty if NULs are in it
    read: Callable[[int, int], bytes]  # (length, offset)


def take(read: Callable[[int, int], bytes], size: int, name: str) -> Sample:
    """Read the parts of a file of `size` bytes."""
    head = read(HEAD, 0)
    return Sample(name, size, head, read(TAIL, max(0, size - TAIL)), _text(head[:TEXT]), read)


def _text(head: bytes) -> str:
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = head.decode(encoding, errors="replace")
    return "" if "\0" in text else text.lstrip()


def is_tar(header: bytes) -> bool:
    """Return whether a block is the header of a tar member; the oldest kind has no signature."""
    field = header[148:156].strip(b"\0 ")
    total = sum(header[:148]) + sum(header[156:512]) + 8 * ord(" ")
    sound = re.fullmatch(rb"[0-7]{1,7}", field) and int(field, 8) == total
    return header[257:262] == b"ustar" or bool(sound)


def tar_names(sample: Sample) -> Iterator[str]:
    """Yield the names of the first members of a tar archive, from their headers."""
    at = 0
    for _ in range(MEMBERS):
        header = sample.read(512, at)
        if not is_tar(header):
            return
        yield header[:100].rstrip(b"\0").decode(errors="replace")
        field = header[124:136]  # octal, or binary after a byte of 0x80
        digits = field.strip(b"\0 ")
        if field[0] == 0x80:
            size = int.from_bytes(field[1:])
        elif re.fullmatch(rb"[0-7]+", digits):
            size = int(digits, 8)
        else:
            return
        at += 512 + -(-size // 512) * 512
        if at >= sample.size:
            return


def zip_names(sample: Sample) -> Iterator[str]:
    """Yield the names of the first members of a ZIP, as long as the headers tell their sizes."""
    at = 0
    for _ in range(MEMBERS):
        header = sample.read(30, at)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            return
        name, extra = (int.from_bytes(header[start : start + 2], "little") for start in (26, 28))
        yield sample.read(name, at + 30).decode(errors="replace")
        size = int.from_bytes(header[18:22], "little")
        if header[6] & 8 or size == 0xFFFF_FFFF:  # the size is behind the member, or in `extra`
            return
        at += 30 + name + extra + size
