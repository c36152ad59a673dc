"""Recognize a file that is not what an argument needs, and say what to do with such a file.

`FILES` and `DISKS` are the table. A row is a kind of file: the words for it, the cure, and the
signature. The first row that matches counts. To add a kind, add a row.

Text of a file is cut, and shown as its `repr()`. The name of an archive's member becomes part of a
command only if it consists of letters, digits and a few harmless characters.

No library helps: libmagic and the like return a MIME type, so each kind would still need its row
here for the cure, and they do not know many of these kinds (an error of S3, a Git LFS pointer).
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from smolvm_async.images.sample import MEMBERS, Sample, is_tar, take, tar_names, zip_names

SHOWN = 80  # characters of a text in a message
SAFE_NAME = r"(?!.*\.\.)(\./)?\w[\w./+-]{0,199}"  # not an option, and no path outside the directory
INNER_DISKS = {".qcow2": "", ".img": "", ".raw": "raw", ".vmdk": "vmdk", ".vdi": "vdi"}
INNER_DISKS |= {".vhd": "vpc", ".vhdx": "vhdx"}  # suffixes, and the format to convert from
WANTED = {
    "qcow2": "a qcow2 image",
    "raw": "a raw disk",
    "kernel": "a Linux kernel for x86-64",
    "initrd": "an initramfs",
    "zstd": "a zstd file",
}
INSTEAD = {
    "kernel": "pass a bzImage, such as /boot/vmlinuz-*, or an uncompressed vmlinux",
    "initrd": "pass an initramfs, such as /boot/initrd.img-*",
}


class Kind(NamedTuple):
    """A row of the table."""

    words: str
    cure: str | Callable[[Sample], str]  # {file} and {qcow2}: its path, and a path for the result
    match: Callable[[Sample], object]
    shows: Callable[[Sample], str] = lambda sample: ""  # a part of the file, to follow the words
    uses: str = ""  # the keys of `WANTED` for which such a file is right


def problem(fd: int, name: str, use: str) -> str | None:
    """Return why an open file is not what `use` needs; `None` if it may be right, or is unknown.

    The problem continues a sentence that begins with the file's name.

    Args:
        name: The file's path, for commands.
        use: A key of `WANTED`.
    """
    sample = take(lambda length, at: os.pread(fd, length, at), os.fstat(fd).st_size, name)
    if not sample.size:
        return "is empty (0 bytes); download or copy it again"
    kind = _kind(sample)
    if kind is None or use in kind.uses.split():
        return None
    if use in INSTEAD and kind not in FILES:
        cure = INSTEAD[use]
    elif isinstance(kind.cure, str):
        cure = kind.cure.format(file=_quoted(name), qcow2=_beside(name, ".qcow2"))
    else:
        cure = kind.cure(sample)
    return f"is not {WANTED[use]}, but {kind.words}{kind.shows(sample)}; {cure}"


def words(head: bytes, use: str = "") -> str:
    """Return the words for a file with this beginning; empty if it fits `use`, or is unknown."""
    sample = take(lambda length, at: head[at : at + length], len(head), "")
    kind = _kind(sample)
    return "" if kind is None or use in kind.uses.split() else kind.words + kind.shows(sample)


def _kind(sample: Sample) -> Kind | None:
    return next((kind for kind in (*FILES, *DISKS, OTHER_TEXT) if kind.match(sample)), None)


def irregular(path: Path, mode: int, wanted: str) -> str:
    """Return what to do with a directory, a pipe, a socket or a device.

    The sentence continues after the file's name; `wanted` ends it, such as "a qcow2 file".
    """
    if stat.S_ISDIR(mode):
        return _directory(path, wanted)
    copy = f"copy it with qemu-img convert -f raw -O qcow2 {_quoted(str(path))} disk.qcow2, and "
    words, cure = {
        stat.S_IFIFO: ("a FIFO (a pipe)", "save its data in a file, and "),
        stat.S_IFSOCK: ("a socket", ""),
        stat.S_IFBLK: ("a block device", copy),
    }.get(stat.S_IFMT(mode), ("a character device", ""))
    return f"is not a plain file, but {words}: {cure}pass {wanted}"


def _directory(path: Path, wanted: str) -> str:
    names: list[str] = []
    with suppress(OSError), os.scandir(path) as entries:
        names = [entry.name for entry in islice(entries, MEMBERS)]
    if "oci-layout" in names:
        return f"is a container image (a directory with an OCI layout); {NOT_A_CONTAINER}"
    disks = [name for name in sorted(names) if name.endswith(".qcow2") and name.isprintable()]
    example = f", such as {disks[0]!r}" if disks and "qcow2" in wanted else ""
    return f"is a directory: pass the {wanted.partition(' ')[2]} inside it{example}"


# Signatures


def _at(offset: int, *signatures: bytes) -> Callable[[Sample], object]:
    return lambda sample: sample.head.startswith(signatures, offset)


def _text(pattern: str) -> Callable[[Sample], object]:
    """Match a text that begins with a pattern."""
    return lambda sample: re.match(pattern, sample.text, re.IGNORECASE)


def _markup(*tags: str) -> Callable[[Sample], object]:
    """Match HTML or XML that has one of these tags, after comments and declarations."""
    pattern = f"<({'|'.join(tags)})[ >\r\n\t]"
    return lambda sample: (
        sample.text.startswith("<") and re.search(pattern, sample.text, re.IGNORECASE)
    )


def _description(sample: Sample) -> object:
    markup = _markup(r"(?:ovf:)?Envelope", "VirtualBox", "domain")  # OVF, its own, libvirt's
    return markup(sample) or _text(r"\.encoding|config\.version|#!/usr/bin/vm")(sample)  # VMX


def _torrent(sample: Sample) -> object:
    return re.match(rb"d\d\d?:", sample.head) and re.search(rb"8:announce|4:info", sample.head)


def _container(sample: Sample) -> object:
    return any(name in ("oci-layout", "manifest.json") for name in tar_names(sample))


def _dmg(sample: Sample) -> object:
    encrypted = (b"encrcdsa", b"cdsaencr")
    return sample.tail.startswith(b"koly") or sample.head.startswith(encrypted)


def _program(sample: Sample) -> object:
    at = int.from_bytes(sample.head[60:64], "little")
    return sample.head.startswith(b"MZ") and sample.head.startswith(b"PE\0\0", at)


# Parts of a file, for the message


def _shown(text: str) -> str:
    from html import unescape  # a large table

    text = " ".join(unescape(text[: 4 * SHOWN]).split())
    return f" ({text[:SHOWN] + '...' if len(text) > SHOWN else text!r})" if text else ""


def _beginning(sample: Sample) -> str:
    return _shown(sample.text)


def _found(*patterns: str) -> Callable[[Sample], str]:
    """Show the first group of each pattern that is found."""

    def show(sample: Sample) -> str:
        found = [re.search(pattern, sample.text, re.IGNORECASE) for pattern in patterns]
        return _shown(": ".join(match[1] for match in found if match))

    return show


def _label(sample: Sample) -> str:
    """Show the volume's name in an ISO 9660 image."""
    known = sample.head.startswith(b"CD001", 32769)
    return _shown(sample.head[32808:32840].decode("ascii", "replace")) if known else ""


# Cures


def _quoted(name: str) -> str:
    return shlex.quote(name) if name.isprintable() else "FILE"


def _beside(name: str, suffix: str) -> str:
    """Return a name for the result of a command, quoted for a shell."""
    made = os.path.splitext(name)[0] + suffix
    return _quoted(made if made != name else f"{name}.new{suffix}")


def _extract(command: str, sample: Sample) -> str:
    """Return the cure for an archive; name the disk in it if it is found."""
    file = _quoted(sample.name)
    for name in zip_names(sample) if command == "unzip" else tar_names(sample):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in INNER_DISKS or not re.fullmatch(SAFE_NAME, name):
            continue
        source = INNER_DISKS[suffix.lower()]
        made = f", make a qcow2 with qemu-img convert -f {source} -O qcow2 {name} {stem}.qcow2"
        return f"extract the disk with {command} {file} {name}{made * bool(source)}, and pass it"
    return f"extract its files with {command} {file}, and pass the disk, if one is among them"


def _decompress(command: str, sample: Sample) -> str:
    file = _quoted(sample.name)
    if re.search(r"\.(tar\.\w+|t[gbx]z2?|tzst|box)$", sample.name):
        return f"extract its files with tar -xf {file}, and pass the disk among them"
    return f"unpack it with {command} {file} > {_beside(sample.name, '')}, and pass the result"


def _archive(words: str, command: str, *signatures: bytes) -> Kind:
    return Kind(words, partial(_extract, command), _at(0, *signatures))


def _compressed(words: str, command: str, *signatures: bytes, uses: str = "initrd") -> Kind:
    return Kind(words, partial(_decompress, command), _at(0, *signatures), uses=uses)


def _file_system(name: str, at: int, signature: bytes) -> Kind:
    cure = f"{CONVERT.format('raw')} with a kernel=, since it has no boot loader"
    return Kind(f"a file system ({name})", cure, _at(at, signature), uses="raw initrd")


def _disk(words: str, driver: str, *signatures: bytes, at: int = 0) -> Kind:
    return Kind(words, CONVERT.format(driver), _at(at, *signatures))


CONVERT = "convert it with qemu-img convert -f {} -O qcow2 {{file}} {{qcow2}}, and pass the result"
DECRYPT = (
    "decrypt it with qemu-img convert --object secret,id=key,file=PASSPHRASE --image-opts "
    "driver=luks,key-secret=key,file.filename={file} -O qcow2 {qcow2} (PASSPHRASE is the path of a "
    "file with the passphrase), and pass the result"
)
INSTALL = (
    "install the system from it into a new qcow2, such as with virt-manager, and pass the qcow2; "
    "for Linux, a cloud image (a qcow2) needs no installation"
)
NOT_A_CONTAINER = (
    "a container has no kernel and no boot loader: use the image of a VM, such as a cloud image"
)
TORRENT = "download the file with a torrent client, such as aria2c, and pass the result"

CONTROL = "[\1-\x08\x0e-\x1a\x1c-\x1f]"  # characters that no text has
CHECKSUMS = r"(#.{0,200}\n)?(-----BEGIN PGP|(SHA|MD5|BLAKE2)\w{0,8} ?\(|[\da-f]{32,128}(\s|\Z))"
JSON = r"(json:)?\{\s*[\"}]|\[\s*[\[\]{\"\d]"

# Files without a disk, or with a disk in a wrapper. The cures help for a kernel as well.
FILES = (
    Kind(
        "a Git LFS pointer, which stands for the real file",
        "get the real file with git lfs pull in its repository, and pass it again",
        _text(r"version https://(git-lfs|hawser)\.github\.com/"),
    ),
    Kind(
        "a git-annex pointer, which stands for the real file",
        "get the real file with git annex get {file} in its repository, and pass it again",
        _text("/annex/objects/"),
    ),
    Kind(
        "a description of a VM",
        "pass the disk that it names, which is usually beside it",
        _description,
        _found(r"""\bhref="([^"<>]{1,200})""", r"""<source file=['"]([^'"<>]{1,200})"""),
    ),
    Kind("a torrent", TORRENT, _torrent),
    Kind("a magnet link", TORRENT, _text("magnet:")),
    Kind("a metalink", "download the file with aria2c -M {file}", _markup("metalink")),
    Kind(
        "a web page",
        "the server sent a page instead of the file, such as an error or a login: open the address "
        "in a browser, and download the file itself",
        _markup("!doctype html", "html", "head", "body", "title", "h1", "meta", "script"),
        _found("<title[^<>]{0,100}>([^<]{1,200})"),
    ),
    Kind(
        "the error message of a server",
        "check the address and your rights there, and download the file again",
        _markup("error", "code"),
        _found("<code>([^<]{1,100})", "<message>([^<]{1,200})"),
    ),
    Kind("an XML text", "pass the disk itself", _text(r"<(\?xml|!--)"), _beginning),
    Kind(
        "the manifest of an image",
        "pass the disk that it names",
        lambda sample: sample.text.startswith("{") and '"rootfs"' in sample.text,
    ),
    Kind(
        "a JSON text",
        "if a server sent it instead of the file, download the file again; if it describes a disk, "
        "pass the disk itself",
        _text(JSON),
        _beginning,
    ),
    Kind(
        "a list of checksums, or a signature",
        "pass the file that it belongs to",
        _text(CHECKSUMS),
        _beginning,
    ),
    Kind(
        "a script",
        "if it makes an image, run it, and pass the image",
        _text("#!|@echo off"),
        _beginning,
    ),
    Kind("a container image", NOT_A_CONTAINER, _container),
    Kind("a tar archive", partial(_extract, "tar -xf"), lambda sample: is_tar(sample.head[:512])),
    _archive("a ZIP archive", "unzip", b"PK\3\4", b"PK\5\6", b"PK\7\x08"),
    _archive("a 7z archive", "7z x", b"7z\xbc\xaf\x27\x1c"),
    _archive("a RAR archive", "unrar x", b"Rar!\x1a\7"),
    _archive("a cabinet", "cabextract", b"MSCF\0\0\0\0"),
    _archive("an ar archive, such as a Debian package", "ar x", b"!<arch>\n"),
    _archive("an RPM package", "rpm2archive", b"\xed\xab\xee\xdb"),
    _compressed("a gzip file", "gzip -dc", b"\x1f\x8b"),
    _compressed("a bzip2 file", "bzip2 -dc", *(b"BZh%d" % level for level in range(1, 10))),
    _compressed("an xz file", "xz -dc", b"\xfd7zXZ\0"),
    _compressed("an LZMA file", "xz -dc", b"]\0\0"),
    _compressed("a zstd file", "zstd -dc", b"\x28\xb5\x2f\xfd", uses="initrd zstd"),
    _compressed("an LZ4 file", "lz4 -dc", b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18"),
    _compressed("an LZO file", "lzop -dc", b"\x89LZO\0"),
    _compressed("an lzip file", "lzip -dc", b"LZIP"),
    _compressed("a compress file", "gzip -dc", b"\x1f\x9d"),
)

# Disks, parts of disks, and media to install from. The cures make a qcow2.
DISKS = (
    Kind(
        "a qcow2 image",
        "give its format as qcow2",
        _at(0, b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3"),
        uses="qcow2",
    ),
    _disk("a QCOW of version 1", "qcow", b"QFI\xfb\0\0\0\1"),
    _disk("a VMDK", "vmdk", b"KDMV", b"COWD", b"# Disk DescriptorFile"),
    _disk("a VHDX", "vhdx", b"vhdxfile"),
    _disk("a VHD", "vpc", b"conectix"),
    _disk("a VDI", "vdi", b"\x7f\x10\xda\xbe", at=64),
    _disk("a QED", "qed", b"QED\0"),
    _disk("a Parallels disk", "parallels", b"WithoutFreeSpace", b"WithouFreSpacExt"),
    _disk("a Bochs disk", "bochs", b"Bochs Virtual HD Image"),
    Kind(
        "a VHD of fixed size",
        CONVERT.format("vpc"),
        lambda sample: sample.tail.startswith(b"conectix"),
        uses="raw",
    ),
    Kind("a LUKS-encrypted disk", DECRYPT, _at(0, b"LUKS\xba\xbe"), uses="raw"),
    Kind("an ISO image", INSTALL, _at(32769, b"CD001", b"BEA01", b"NSR0"), _label, uses="raw"),
    Kind(
        "a Windows image (WIM or ESD)",
        "install Windows from an ISO into a new qcow2, or apply the image to a partition with "
        "wimlib-imagex apply {file} 1 PARTITION, and pass the disk",
        _at(0, b"MSWIM\0\0\0", b"WLPWM\0\0\0"),
    ),
    Kind(
        "a DMG of macOS",
        "macOS is not supported; if it holds another system's disk, unpack it with dmg2img {file}",
        _dmg,
    ),
    Kind(
        "a squashfs file system, as in live media",
        INSTALL,
        _at(0, b"hsqs", b"sqsh"),
        uses="raw initrd",
    ),
    Kind(
        "a cpio archive, such as an initramfs",
        "pass it as initrd=, and a qcow2 as image=",
        _at(0, b"070701", b"070702", b"070707"),
        uses="initrd",
    ),
    Kind(
        "a Linux kernel",
        "pass it as kernel=, and a qcow2 as image=",
        _at(514, b"HdrS"),
        uses="kernel raw",
    ),
    Kind(
        "a program of Linux, or a kernel (ELF)",
        "pass a kernel as kernel=, and a qcow2 as image=",
        _at(0, b"\x7fELF"),
        uses="kernel",
    ),
    Kind(
        "a raw disk",
        CONVERT.format("raw"),
        lambda sample: _at(510, b"\x55\xaa")(sample) or _at(512, b"EFI PART")(sample),
        uses="raw",
    ),
    Kind(
        "a program of Windows or UEFI",
        "if it unpacks or downloads an image, run it in Windows, and pass the image",
        _program,
    ),
    _file_system("ext2, ext3 or ext4", 0x438, b"\x53\xef"),
    _file_system("xfs", 0, b"XFSB"),
    _file_system("btrfs", 65600, b"_BHRfS_M"),
    _file_system("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    _file_system("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    Kind(
        "a file that begins with zeros, without a partition table or a file system",
        "download or copy it again if that has not finished; otherwise, no system is installed on "
        "this disk: pass another one",
        lambda sample: not sample.head.strip(b"\0"),
        uses="raw initrd",
    ),
)
# Last, since a VMDK's descriptor is a text, too.
OTHER_TEXT = Kind(
    "a text",
    "download the file again if a server sent this text instead",
    lambda sample: sample.text and not re.search(CONTROL, sample.text),
    _beginning,
    uses="raw initrd",
)
