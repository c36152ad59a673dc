"""Files that are not disks: the error says what the file is, and the cure in it works."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pycdlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvm_async.errors import ImageError
from smolvm_async.images import kinds
from smolvm_async.images.local import check_disk, open_image, open_initrd, open_kernel
from smolvm_async.images.manifest import parse_manifest
from smolvm_async.images.qcow2 import Qcow2Error
from smolvm_async.images.sample import HEAD, MEMBERS
from tests.unit.test_qcow2 import aes, at_most, create, in_memory, run

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1 << 20
MBR = (b"\xfa" + bytes(509) + b"\x55\xaa").ljust(MIB, b"\0")


def refusal(path: Path) -> str:
    """Return the message for a file that is passed as an image."""
    with pytest.raises(ImageError) as caught, open_image(path):
        pass
    message = str(caught.value)
    assert message.startswith(f"image {str(path)!r} ")
    assert message.endswith(".")
    assert message.isprintable()
    return message


def old_tar(*names: str) -> bytes:
    """A tar archive as Unix V7 made it: without the signature."""
    archive = bytearray(tar(*names))
    for at in range(0, 1024 * len(names), 1024):
        archive[at + 148 : at + 156] = b" " * 8
        archive[at + 257 : at + 512] = bytes(255)
        archive[at + 148 : at + 155] = b"%06o\0" % sum(archive[at : at + 512])
    return bytes(archive)


def tar(*names: str, content: bytes = b"x" * 500, form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def zipped(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 100)
    return out.getvalue()


def iso(udf: str | None = None) -> bytes:
    made, out = pycdlib.PyCdlib(), io.BytesIO()
    made.new(vol_ident="DEBIAN 12 AMD64", udf=udf)
    made.write_fp(out)
    made.close()
    return out.getvalue()


def at(offset: int, signature: bytes) -> bytes:
    return (bytes(offset) + signature).ljust(100_000, b"\1")


def pe() -> bytes:
    return (b"MZ".ljust(60, b"\1") + (128).to_bytes(4, "little")).ljust(128, b"\1") + b"PE\0\0"


HTML = "<!DOCTYPE html>\n<html><head><title>404 Not\n Found</title></head></html>"
S3_ERROR = "<?xml version='1.0'?>\n<Error><Code>NoSuchKey</Code><Message>No key.</Message></Error>"
OVF = '<?xml version="1.0"?>\n<Envelope><References><File ovf:href="disk1.vmdk"/></References>'
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

# Content, what the message says it is, and the part of the cure that matters.
NO_DISKS = {
    "page": (HTML.encode(), "a web page ('404 Not Found')", "download the file itself"),
    "page-bom": (b"\xef\xbb\xbf \r\n" + HTML.upper().encode(), "a web page ('404 NOT", "itself"),
    "page-utf16": (HTML.encode("utf-16"), "a web page ('404 Not Found')", "itself"),
    "page-comment": (b"<!-- x --><html lang=en>\xe9", "a web page", "download the file itself"),
    "xhtml": (b"<?xml version='1.0'?><html xmlns='x'>", "a web page", "download the file itself"),
    "fragment": (b"<h1>Moved</h1>", "a web page", "download the file itself"),
    "s3": (S3_ERROR.encode(), "error message of a server ('NoSuchKey: No key.')", "your rights"),
    "json": (b'{"message": "Not Found"}', """JSON text ('{"message": "Not""", "download the"),
    "json-list": (b'\n[\n {"id": 1}]', "a JSON text", "download the file again"),
    "json-of-qemu": (b'json:{"driver": "nbd"}', "a JSON text", "pass the disk itself"),
    "manifest": (b'{"name": "a", "rootfs": {}}', "the manifest of an image", "disk that it names"),
    "lfs": (LFS.encode(), "a Git LFS pointer", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s5--ab.qcow2\n", "a git-annex pointer", "git annex get"),
    "ovf": (OVF.encode(), "a description of a VM ('disk1.vmdk')", "the disk that it names"),
    "libvirt": (b"<domain type='kvm'><title>t</title>", "a description of a VM", "that it names"),
    "vmx": (b'.encoding = "UTF-8"\n', "a description of a VM", "the disk that it names"),
    "xml": (b"<?xml version='1.0'?><a/>", "an XML text", "the disk itself"),
    "sums": (b"d" * 64 + b" *disk.qcow2\n", "a list of checksums", "the file that it belongs to"),
    "bsd-sums": (b"# Fedora\nSHA256 (disk.qcow2) = d0\n", "a list of checksums", "it belongs to"),
    "signature": (b"-----BEGIN PGP SIGNATURE-----\n", "or a signature", "it belongs to"),
    "script": (b"#!/bin/sh\nexit 1\n", "a script ('#!/bin/sh exit 1')", "run it"),
    "text": (b"404 page not found\n", "a text ('404 page not found')", "download the file again"),
    "torrent": (b"d8:announce20:udp://tracker.org:4:infod", "a torrent", "aria2c"),
    "magnet": (b"magnet:?xt=urn:btih:c12f", "a magnet link", "aria2c"),
    "metalink": (b"<metalink xmlns='x'>", "a metalink", "aria2c -M"),
    "ova": (tar("a.ovf", "a.vmdk", "a.mf"), "a tar archive", "-f vmdk -O qcow2 a.vmdk a.qcow2"),
    "v7": (old_tar("b", "a.vhd"), "a tar archive", "-f vpc -O qcow2 a.vhd a.qcow2"),
    "tar": (tar("notes"), "a tar archive", "extract its files with tar -xf"),
    "pax": (tar("./disk.raw", form=tarfile.PAX_FORMAT), "a tar archive", "qcow2 ./disk.raw ./disk"),
    "oci": (tar("blobs/sha256/ab", "oci-layout"), "a container image", "such as a cloud image"),
    "docker": (tar("ab/layer.tar", "manifest.json"), "a container image", "such as a cloud image"),
    "zip": (zipped("win/", "win/disk.vhdx"), "a ZIP archive", "-f vhdx -O qcow2 win/disk.vhdx"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), "a 7z archive", "7z x"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(100), "a RAR archive", "unrar x"),
    "cab": (b"MSCF\0\0\0\0" + bytes(100), "a cabinet", "cabextract"),
    "gz": (gzip.compress(MBR), "a gzip file", "gzip -dc"),
    "bz2": (bz2.compress(MBR), "a bzip2 file", "bzip2 -dc"),
    "xz": (lzma.compress(MBR), "an xz file", "xz -dc"),
    "lzma": (lzma.compress(MBR, lzma.FORMAT_ALONE), "an LZMA file", "xz -dc"),
    "zst": (zstd.compress(MBR), "a zstd file", "zstd -dc"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(100), "an LZ4 file", "lz4 -dc"),
    "tgz": (gzip.compress(tar("disk.raw")), "a gzip file", "tar -xf"),
    "luks": (b"LUKS\xba\xbe\0\2" + bytes(100), "a LUKS-encrypted disk", "key-secret=key,file."),
    "iso": (iso(), "an ISO image ('DEBIAN 12 AMD64')", "install the system from it"),
    "hybrid": (MBR[:512] + iso()[512:], "an ISO image ('DEBIAN", "install the system from it"),
    "bridge": (iso("2.60"), "an ISO image ('DEBIAN", "install the system from it"),
    "udf": (at(32768, b"\0BEA01\1"), "an ISO image", "install the system from it"),
    "wim": (b"MSWIM\0\0\0" + bytes(4000), "a Windows image (WIM or ESD)", "wimlib-imagex apply"),
    "dmg": (bytes(5000) + b"koly".ljust(512, b"\0"), "a DMG of macOS", "not supported"),
    "squashfs": (b"hsqs" + bytes(100), "a squashfs file system", "install the system"),
    "elf": (Path(sys.executable).read_bytes()[:5000], "a program of Linux", "as kernel="),
    "bzimage": (at(514, b"HdrS"), "a Linux kernel", "pass it as kernel="),
    "exe": (pe(), "a program of Windows or UEFI", "run it in Windows"),
    "cpio": (b"070701" + b"0" * 104 + b".\0", "a cpio archive", "pass it as initrd="),
    "zeros": (bytes(5000), "begins with zeros", "no system is installed"),
    "noise": (b"\0\1\2" * 100, "begins with b'\\x00\\x01", "the right file"),
}


@pytest.mark.parametrize(
    ("suffix", "content", "words", "cure"), [(name, *row) for name, row in NO_DISKS.items()]
)
@pytest.mark.parametrize("name", ["file.qcow2", "file"])
def test_a_file_that_is_not_a_disk_is_named_and_has_a_cure_of_its_own(
    tmp_path: Path, suffix: str, content: bytes, words: str, cure: str, name: str
) -> None:
    path = tmp_path / (f"{name}.{suffix}" if name == "file" else name)
    path.write_bytes(content)
    message = refusal(path)
    assert "is not a qcow2 image" in message
    assert words in message
    assert cure in message or suffix == "tgz"  # whose name says that it has a tar archive in it
    assert "convert it with qemu-img" not in message or suffix == "noise"


def test_a_sparse_file_without_a_partition_table_is_not_advised_to_be_converted(
    tmp_path: Path,
) -> None:
    path = tmp_path / "disk.qcow2"
    path.touch()
    os.truncate(path, 1 << 40)
    assert "without a partition table" in refusal(path)
    assert "convert" not in refusal(path)


# The commands in the cures


def extracted(message: str, first: str) -> list[str]:
    """Return the command in a message that begins with the word `first`."""
    found = re.search(rf" with ({first} .*?)(?=, |\.$| \()", message)
    assert found is not None
    return shlex.split(found[1])


VARIANTS: list[tuple[str, list[str]]] = [
    *((driver, []) for driver in ("qcow", "qed", "vdi", "vhdx", "vpc", "vmdk", "parallels")),
    ("vpc", ["-o", "subformat=fixed"]),
    ("vmdk", ["-o", "subformat=monolithicFlat"]),
    ("vmdk", ["-o", "subformat=streamOptimized"]),
    ("vmdk", ["-o", "subformat=twoGbMaxExtentSparse"]),
]


@pytest.mark.parametrize(("driver", "options"), VARIANTS, ids=lambda value: "".join(value))
@pytest.mark.parametrize("name", ["a disk's", "disk.qcow2"])
def test_the_command_in_the_error_makes_a_qcow2_of_another_disk(
    tmp_path: Path, driver: str, options: list[str], name: str
) -> None:
    raw, path = tmp_path / "raw", tmp_path / name
    raw.write_bytes(MBR)
    run("qemu-img", "convert", "-f", "raw", "-O", driver, *options, raw, path)
    command = extracted(refusal(path), "qemu-img convert")
    assert command[:4] == ["qemu-img", "convert", "-f", driver]
    run(*command)
    with open_image(Path(command[-1])) as image:
        assert image.virtual_size >= MIB
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, command[-1])


@pytest.mark.parametrize(
    "content",
    [MBR, at(512, b"EFI PART"), at(0x438, b"\x53\xef"), at(65600, b"_BHRfS_M")],
    ids=["mbr", "gpt", "ext4", "btrfs"],
)
def test_the_command_in_the_error_makes_a_qcow2_of_a_raw_disk(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(content.ljust(MIB, b"\0"))
    command = extracted(refusal(path), "qemu-img convert")
    run(*command)
    with open_image(Path(command[-1])) as image:
        assert (image.path, image.virtual_size) == (tmp_path / "disk.qcow2", MIB)


@pytest.mark.parametrize("tool", ["gzip", "bzip2", "xz", "zstd", "lz4"])
@pytest.mark.parametrize("name", ["disk.qcow2.packed", "disk"])
def test_the_command_in_the_error_unpacks_a_disk(tmp_path: Path, tool: str, name: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    disk, path = create(tmp_path / "made"), tmp_path / name
    with path.open("wb") as out:
        subprocess.run([tool, "-c", disk], stdout=out, check=True)
    *command, _, result = extracted(refusal(path), tool)
    with Path(result).open("xb") as out:
        subprocess.run(command, stdout=out, check=True)
    with open_image(Path(result)):
        pass


def test_the_commands_in_the_error_extract_the_disk_of_an_appliance(tmp_path: Path) -> None:
    create(tmp_path / "a disk.vmdk", image_format="vmdk")
    create(tmp_path / "disk1.vmdk", image_format="vmdk")
    path = tmp_path / "appliance.ova"
    run("tar", "-cf", path, "-C", tmp_path, "a disk.vmdk", "disk1.vmdk")
    (tmp_path / "disk1.vmdk").unlink()
    message = refusal(path)
    for first in ("tar", "qemu-img"):
        subprocess.run(extracted(message, first), check=True, cwd=tmp_path)
    with open_image(tmp_path / "disk1.qcow2"):
        pass


def test_the_command_in_the_error_decrypts_a_qcow2(tmp_path: Path) -> None:
    path, key, made = tmp_path / "disk", tmp_path / "key", tmp_path / "made"
    key.write_text("secret")
    aes(path)
    words = {"file=PASSPHRASE": f"file={key}", "filename=FILE": f"filename={path}"}
    command = " ".join(extracted(refusal(path), "qemu-img convert"))
    for word, value in {**words, "NEW_FILE": str(made)}.items():
        command = command.replace(word, value)
    run(*command.split())
    with open_image(made) as image:
        assert image.virtual_size == MIB


# Nothing in a file is trusted


@pytest.mark.parametrize(
    "title", ["\x1b[31mred\x07", "&#27;[2J&#x9b;31m", "a\u202eb\u2028", "x" * 5000, "\ud7ff\ufffe"]
)
def test_a_title_is_shown_without_control_characters_and_cut(tmp_path: Path, title: str) -> None:
    path = tmp_path / "page.qcow2"
    path.write_text(f"<html><title>{title}</title>")
    message = refusal(path)
    assert "a web page (" in message
    assert len(message) < 600


@pytest.mark.parametrize(
    "name",
    [
        "--checkpoint-action=exec=sh.vmdk",
        "../../disk.vmdk",
        "/etc/disk.vmdk",
        "a;reboot;.vmdk",
        "$(reboot).vmdk",
        "a\nb.vmdk",
        "\x1b[2J.vmdk",
    ],
)
@pytest.mark.parametrize("pack", [tar, zipped])
def test_a_dangerous_name_in_an_archive_does_not_come_into_a_command(
    tmp_path: Path, name: str, pack: Callable[..., bytes]
) -> None:
    path = tmp_path / "archive"
    path.write_bytes(pack(name))
    assert name not in refusal(path)
    path.write_bytes(pack(name, "disk.vmdk"))
    assert "qcow2 disk.vmdk disk.qcow2" in refusal(path)


def test_a_file_name_is_quoted_for_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "it's a {file}; reboot.vmdk"
    create(path, image_format="vmdk")
    command = extracted(refusal(path), "qemu-img convert")
    assert command[-2:] == [str(path), str(path.with_suffix(".qcow2"))]


@pytest.mark.parametrize(
    "size",
    [b"\x80" + b"\xff" * 11, b"\x80" + bytes(11), b"\xff" * 12, b"-0000000001\0", b"7" * 12, b""],
)
def test_a_tar_archive_with_a_false_size_costs_no_time(size: bytes) -> None:
    archive = bytearray(tar("a.txt", *(f"{number}.txt" for number in range(2 * MEMBERS))))
    archive[124:136] = size.ljust(12, b"\0")
    with in_memory(bytes(archive), 1 << 40) as fd, at_most(3), pytest.raises(Qcow2Error):
        check_disk(fd, "FILE", "qcow2")


SIGNATURES = st.sampled_from([content[:800] for content, _, _ in NO_DISKS.values()])


@given(SIGNATURES, st.binary(max_size=800), st.integers(0, 800))
@settings(max_examples=200)
def test_a_damaged_file_is_named_or_unknown_and_nothing_else(
    begin: bytes, noise: bytes, cut: int
) -> None:
    for use in kinds.WANTED:
        with in_memory(begin[:cut] + noise) as fd:
            reason = kinds.problem(fd, "FILE", use)
        assert reason is None or reason.isprintable()


@pytest.mark.parametrize(
    "text",
    ["<" * HEAD, "<a " * HEAD, '<html href="' * HEAD, "<title" * HEAD, "[ " * HEAD, "#" * HEAD],
)
def test_a_text_made_to_take_long_does_not(text: str) -> None:
    with in_memory(text.encode()) as fd, at_most(3):
        assert kinds.problem(fd, "FILE", "qcow2")


# Raw disks of published images


@pytest.mark.parametrize(
    "content",
    [
        *(MBR, at(512, b"EFI PART"), at(0x438, b"\x53\xef"), b"XFSB".ljust(5000, b"\1")),
        *(bytes(5000), b"\0\1\2" * 1000, b"hsqs".ljust(5000, b"\1"), b"LUKS\xba\xbe\0\1"),
        *(b"a text, or a test's disk " * 100, MBR[:512] + iso()[512:]),
    ],
)
def test_a_raw_disk_of_any_content_is_accepted_as_raw(content: bytes) -> None:
    with in_memory(content) as fd:
        assert check_disk(fd, "disk", "raw") == -(-len(content) // 512) * 512


def test_a_raw_disk_of_fixed_vhd_size_is_accepted_as_raw(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", "-o", "subformat=fixed", size="1M", image_format="vpc")
    with open_image(path, "raw"):
        pass


@pytest.mark.parametrize("kind", ["page", "s3", "json", "lfs", "ova", "zip", "gz", "7z", "wim"])
def test_a_file_that_is_certainly_not_a_disk_is_not_accepted_as_raw(kind: str) -> None:
    content, words, cure = NO_DISKS[kind]
    with in_memory(content) as fd, pytest.raises(Qcow2Error) as caught:
        check_disk(fd, "disk", "raw")
    assert "is not a raw disk, but" in str(caught.value)
    assert words in str(caught.value)
    assert cure in str(caught.value)


def test_a_qcow2_is_not_accepted_as_raw(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    with (
        pytest.raises(ImageError, match=r"not a raw disk, but a qcow2.*format"),
        open_image(path, "raw"),
    ):
        pass


# Kernels, initramfs and manifests


@pytest.mark.parametrize(
    ("kind", "words", "cure"),
    [
        ("page", "but a web page ('404 Not Found')", "download the file itself"),
        ("lfs", "but a Git LFS pointer", "git lfs pull"),
        ("ova", "but a tar archive", "tar -xf"),
        ("iso", "but an ISO image", "pass a"),
        ("zeros", "zeros", "pass a bzImage"),
        ("text", "but a text ('404 page", "pass a bzImage"),
        ("noise", "not a Linux kernel", "pass a bzImage"),
    ],
)
def test_a_kernel_or_initramfs_that_is_another_file_is_named(
    tmp_path: Path, kind: str, words: str, cure: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(NO_DISKS[kind][0])
    for opener in (open_kernel, open_initrd):
        if opener is open_initrd and kind in ("zeros", "text", "noise"):
            continue  # what the kernel does with them is for the kernel to say
        with pytest.raises(ImageError) as caught, opener(path):
            pass
        assert words in str(caught.value)
        assert cure in str(caught.value)


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2", "zst", "lzma", "cpio", "squashfs", "noise"])
def test_an_initramfs_may_be_packed_in_any_way(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(NO_DISKS[kind][0])
    with open_initrd(path) as fd:
        assert os.pread(fd, 4, 0) == NO_DISKS[kind][0][:4]


def test_a_disk_as_kernel_is_not_advised_to_be_converted(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.vmdk", image_format="vmdk")
    with pytest.raises(ImageError, match="but a VMDK; pass a bzImage"), open_kernel(path):
        pass


@pytest.mark.parametrize("kind", ["page", "s3", "lfs", "text", "gz", "zip"])
def test_a_manifest_that_is_another_file_is_named(kind: str) -> None:
    content, words, _ = NO_DISKS[kind]
    with pytest.raises(ImageError) as caught:
        parse_manifest(content, "s3://bucket/smolvm-image.json")
    assert "s3://bucket/smolvm-image.json is not a valid manifest: it is " in str(caught.value)
    assert words in str(caught.value)


# What is not a plain file, or not there


def test_a_directory_is_told_with_the_disk_in_it(tmp_path: Path) -> None:
    assert "pass the qcow2 file inside it." in refusal(tmp_path)
    create(tmp_path / "win11.qcow2")
    assert "pass the qcow2 file inside it, such as 'win11.qcow2'." in refusal(tmp_path)
    (tmp_path / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    assert "is a container image" in refusal(tmp_path)
    assert "cloud image" in refusal(tmp_path)


def test_a_pipe_a_socket_and_a_device_are_named(tmp_path: Path) -> None:
    pipe, path = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    assert "is not a plain file, but a FIFO (a pipe): save its data" in refusal(pipe)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert "but a socket: pass a qcow2 file" in refusal(path)
    assert "but a character device: pass a qcow2 file" in refusal(Path("/dev/zero"))
    block = kinds.irregular(Path("/dev/sda"), stat.S_IFBLK, "a qcow2 file")
    assert "a block device: copy it with qemu-img convert -f raw -O qcow2 /dev/sda" in block


@pytest.mark.parametrize(
    ("target", "cure"),
    [("nowhere.qcow2", "check the link"), (".git/annex/objects/a/b", "git annex get")],
)
def test_a_link_to_nothing_is_told_with_its_target(tmp_path: Path, target: str, cure: str) -> None:
    path = tmp_path / "disk.qcow2"
    path.symlink_to(target)
    assert f"is a link to {target!r}, which does not exist: " in refusal(path)
    assert cure in refusal(path)


@pytest.mark.parametrize("suffix", [".part", ".crdownload", ".aria2"])
def test_an_unfinished_download_is_named_though_its_beginning_is_there(
    tmp_path: Path, suffix: str
) -> None:
    path = create(tmp_path / f"disk.qcow2{suffix}")
    assert f"an unfinished download, since its name ends in {suffix}" in refusal(path)
    complete = path.rename(tmp_path / "disk.qcow2")
    with open_image(complete):
        pass
    (tmp_path / "disk.qcow2.aria2").touch()
    assert "an unfinished download, since 'disk.qcow2.aria2' is beside it" in refusal(complete)
