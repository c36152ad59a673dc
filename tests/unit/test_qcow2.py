"""The qcow2 check against files that qemu-img made, and against hostile ones.

qemu-img is the judge wherever it can be: what it makes is accepted, and what it finds cut off
is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvm_async.errors import ImageError
from smolvm_async.images.local import open_image, starts_by_bios
from smolvm_async.images.qcow2 import Header, Qcow2Error, check, empty, first_sector

KIB, MIB, GIB, TIB, PIB = (1 << shift for shift in (10, 20, 30, 40, 50))

# Where the header's fields are (QEMU's docs/interop/qcow2.txt), and how many bytes each has.
VERSION, BACKING, CLUSTER_BITS, SIZE = (4, 4), (8, 8), (20, 4), (24, 8)
CRYPT, L1_SIZE, L1_OFFSET = (32, 4), (36, 4), (40, 8)
REFCOUNT_OFFSET, REFCOUNT_CLUSTERS, SNAPSHOTS, SNAPSHOT_OFFSET = (48, 8), (56, 4), (60, 4), (64, 8)
INCOMPATIBLE, REFCOUNT_ORDER, HEADER_LENGTH = (72, 8), (96, 4), (100, 4)
DIRTY = 1


def run(*command: str | Path, status: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout


def create(path: Path, *options: str, size: str = "1G", image_format: str = "qcow2") -> Path:
    run("qemu-img", "create", "-q", "-f", image_format, *options, path, size)
    return path


def write(path: Path, *places: tuple[str, str]) -> None:
    """Have QEMU write to the disk in `path`: (offset, length) each."""
    commands = [word for at, length in places for word in ("-c", f"write -q {at} {length}")]
    run("qemu-io", "-f", "qcow2", *commands, path)


def patch(path: Path, field: tuple[int, int], value: int) -> Path:
    """Change a field of the header, or any other number in the file."""
    offset, length = field
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(length, "big"))
    return path


def number(data: bytes, field: tuple[int, int]) -> int:
    offset, length = field
    return int.from_bytes(data[offset : offset + length], "big")


def check_path(path: Path) -> Header:
    with open_file(path) as fd:
        return check(fd)


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def in_memory(data: bytes, size: int | None = None) -> Iterator[int]:
    """A file of these bytes, cut or grown (with a hole) to `size`."""
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        os.ftruncate(fd, len(data) if size is None else size)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Interrupt what takes more processor time; a busy host makes all take longer by the clock."""

    def expired(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# What QEMU makes of its own accord is accepted


@pytest.mark.parametrize(
    "options",
    [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4k,compat=0.10",
        "cluster_size=2M",
        "extended_l2=on",
        "extended_l2=on,cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=2",
        "refcount_bits=8,cluster_size=512",
        "refcount_bits=32",
        "refcount_bits=64",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=metadata,extended_l2=on",
        "preallocation=falloc,cluster_size=4k",
        "preallocation=full",
    ],
)
def test_every_option_of_qemu_img_is_accepted(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "disk.qcow2", "-o", options, size="32M")
    assert check_path(path).virtual_size == 32 * MIB
    write(path, ("0", "64k"), ("1000000", "3000000"), (str(32 * MIB - 512), "512"))
    assert check_path(path).virtual_size == 32 * MIB


def scattered(path: Path, *options: str) -> Path:
    """A disk of 3 MiB, of which a good part is in use."""
    create(path, *options, size="3M")
    places = [(str(at * 40_960), "20k") for at in random.Random(1).sample(range(75), 40)]
    write(path, *places)
    return path


def allocated(path: Path, offset: int) -> bool:
    """Return whether the cluster of the disk at `offset` is in use."""
    return "1/1" in run("qemu-io", "-f", "qcow2", "-r", "-c", f"alloc {offset} 1", path)


def plain_512(path: Path) -> None:
    scattered(path, "-o", "cluster_size=512")


def plain_64k(path: Path) -> None:
    scattered(path)


def narrow_counts(path: Path) -> None:
    """Eight clusters are counted in one byte; the last one stands in its middle."""
    scattered(path, "-o", "cluster_size=512,refcount_bits=1")
    while path.stat().st_size // 512 % 8 != 5:
        free = next(at for at in range(0, 3 * MIB, 4 * KIB) if not allocated(path, at))
        write(path, (str(free), "512"))


def wide_counts(path: Path) -> None:
    scattered(path, "-o", "cluster_size=512,refcount_bits=64")


def extended_l2(path: Path) -> None:
    scattered(path, "-o", "extended_l2=on,cluster_size=16k")


def compressed(path: Path, *options: str) -> None:
    raw = path.with_suffix(".raw")
    noise = random.Random(2)
    raw.write_bytes(b"".join(noise.randbytes(3000).ljust(7000, b"x") for _ in range(200)))
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *options, raw, path)


def compressed_zstd(path: Path) -> None:
    compressed(path, "-o", "compression_type=zstd,cluster_size=4k")


def with_snapshots(path: Path) -> None:
    scattered(path, "-o", "cluster_size=4k")
    run("qemu-img", "snapshot", "-c", "before", path)
    write(path, ("0", "200k"), ("2M", "100k"))
    run("qemu-img", "snapshot", "-c", "after", path)


def with_bitmap(path: Path) -> None:
    scattered(path, "-o", "cluster_size=4k")
    run("qemu-img", "bitmap", "--add", "-g", "4k", path, "changed")
    write(path, ("0", "200k"))


def crashed(path: Path) -> None:
    """Dirty: its reference counts were still in memory when QEMU died."""
    scattered(path, "-o", "cluster_size=4k,lazy_refcounts=on")
    run(
        *("qemu-io", "-f", "qcow2", "-c", "write -q 0 3M", "-c", "sigraise 9", path),
        status=-signal.SIGKILL,
    )
    assert number(path.read_bytes(), INCOMPATIBLE) == DIRTY


IMAGES = [
    plain_512,
    plain_64k,
    narrow_counts,
    wide_counts,
    extended_l2,
    compressed,
    compressed_zstd,
    with_snapshots,
    with_bitmap,
]


@pytest.mark.parametrize("make", [*IMAGES, crashed])
def test_the_first_sector_is_the_one_that_qemu_reads(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "disk.qcow2"
    make(path)
    for how in ("", "write -q -P 0xa5 0 512", "write -q -z 0 64k", "discard -q 0 64k"):
        if how:
            run("qemu-io", "-f", "qcow2", "-c", how, path)
        raw = path.with_suffix(".sector")
        dd = ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=512", "count=1"]
        run(*dd, f"if={path}", f"of={raw}")
        with open_file(path) as fd:
            found = first_sector(fd)
        if make is extended_l2 or (make in (compressed, compressed_zstd) and not how):
            assert found is None
        else:
            assert found == raw.read_bytes()


@pytest.mark.parametrize("build", IMAGES)
def test_a_disk_in_use_is_accepted_whole_and_refused_cut_off(
    tmp_path: Path, build: Callable[[Path], None]
) -> None:
    """At every length at which QEMU cannot open what is left, or finds a piece of it missing.

    A cut within the last cluster is not a loss to QEMU: the rest reads as zeros.
    """
    path = tmp_path / "disk.qcow2"
    build(path)
    data = path.read_bytes()
    assert check_path(path).virtual_size in (3 * MIB, 1_400_320)
    with in_memory(data) as fd:  # as after a crash
        os.pwrite(fd, (number(data, INCOMPATIBLE) | DIRTY).to_bytes(8, "big"), INCOMPATIBLE[0])
        check(fd)
    judged = 0
    for length in lengths(data):
        path.write_bytes(data[:length])
        if broken_for_qemu(path):
            with pytest.raises(Qcow2Error, match=r"truncated|empty|not a qcow2"):
                pytest.fail(f"cut to {length} of {len(data)} bytes: {check_path(path)}")
            judged += 1
    assert judged > 50


def lengths(data: bytes) -> list[int]:
    """Lengths to cut `data` to: where a structure begins, a little after, and at random."""
    cluster = 1 << number(data, CLUSTER_BITS)
    counts, mapping = number(data, REFCOUNT_OFFSET), number(data, L1_OFFSET)
    blocks = entries(data, counts, cluster)
    places = {counts, mapping, *blocks, *entries(data, mapping, number(data, L1_SIZE) * 8)}
    counted = max(blocks)
    around = (0, cluster // 2, cluster + 1)
    noise = random.Random(3)
    chosen = {place + noise.choice(around) for place in places}
    chosen |= {max(places) + distance for distance in around}
    chosen |= {counted + distance for distance in around}
    chosen |= {len(data) - distance * cluster - 1 for distance in range(6)}
    chosen |= {0, 3, 71, 72, 103, 104, 511, 512}
    chosen |= {noise.randrange(len(data)) for _ in range(60)}
    return sorted(length for length in chosen if length < len(data))


def entries(data: bytes, offset: int, length: int) -> set[int]:
    """The offsets in a table."""
    table = struct.iter_unpack(">Q", data[offset : offset + length])
    return {entry & 0x00FF_FFFF_FFFF_FE00 for (entry,) in table}


def broken_for_qemu(path: Path) -> bool:
    """Return whether qemu-img fails to open the image, or misses parts of it."""
    command = ["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)]
    before = path.read_bytes()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if path.read_bytes() != before:  # it repairs dirty ones
        path.write_bytes(before)
    if done.returncode == 1 and not done.stdout:
        return True
    found = json.loads(done.stdout)
    return "exceeding the end of the file" in done.stderr or bool(found["check-errors"])


def test_a_cluster_that_was_counted_but_never_used_counts_as_lost_until_repaired(
    tmp_path: Path,
) -> None:
    """A QEMU that dies while the file grows may leave one; the cure that is named has to help."""
    path = create(tmp_path / "disk.qcow2")
    write(path, ("0", "1M"))
    data = path.read_bytes()
    block = number(data, (number(data, REFCOUNT_OFFSET), 8))
    patch(path, (block + 2 * 1000, 2), 1)
    assert len(data) < 1000 * 64 * KIB
    with pytest.raises(Qcow2Error, match="truncated") as caught:
        check_path(path)
    result = path
    if "qemu-img convert -O qcow2" in str(caught.value):
        result = tmp_path / "converted.qcow2"
        run("qemu-img", "convert", "-O", "qcow2", path, result)
    else:
        assert "qemu-img check -r all" in str(caught.value)
        run("qemu-img", "check", "-q", "-r", "all", path)
    assert check_path(result).virtual_size == GIB


def test_an_image_that_a_crash_left_dirty_is_accepted(tmp_path: Path) -> None:
    """Its counts were still in memory; QEMU does not need them to read it."""
    path = tmp_path / "disk.qcow2"
    crashed(path)
    assert check_path(path).virtual_size == 3 * MIB
    path = create(tmp_path / "uncounted.qcow2", "-o", "cluster_size=4k,lazy_refcounts=on")
    write(path, ("0", "1M"))
    data = path.read_bytes()
    block = number(data, (number(data, REFCOUNT_OFFSET), 8))
    for count in range(0, 4 * KIB, 8):
        patch(path, (block + count, 8), 0)
    patch(path, INCOMPATIBLE, DIRTY)
    assert check_path(path).virtual_size == GIB


# What QEMU must not see is refused, each with its own sentence


def luks(path: Path) -> None:
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options]
    command += ["--object", "secret,id=key,data=secret", str(path), "1M"]
    for _ in range(20):  # on a busy machine it fails now and then: "accurate CPU usage"
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
    pytest.fail("qemu-img makes no encrypted disk")


def aes(path: Path) -> None:
    secret = ("--object", "secret,id=key,data=secret")
    create(path, *secret, "-o", "encrypt.format=aes,encrypt.key-secret=key", size="1M")


def backed(path: Path) -> None:
    create(path, "-b", str(create(path.with_name("base"))), "-F", "qcow2")


def backed_by_a_secret(path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", path)


def backed_v2(path: Path) -> None:
    create(path, "-o", "compat=0.10", "-b", str(create(path.with_name("base"))), "-F", "qcow2")


def data_file(path: Path) -> None:
    create(path, "-o", f"data_file={path}.raw", size="1M")


def raw_data_file(path: Path) -> None:
    create(path, "-o", f"data_file={path}.raw,data_file_raw=on", size="1M")


def made_as(image_format: str) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        create(path, size="1M", image_format=image_format)

    build.__name__ = image_format
    return build


def vmdk_in_pieces(path: Path) -> None:
    piece = path.with_suffix(".vmdk")
    create(piece, "-o", "subformat=monolithicFlat", size="1M", image_format="vmdk")
    piece.rename(path)  # the descriptor; the disk is another file


def with_header(name: str, *changes: tuple[tuple[int, int], int]) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        create(path, size="1T")
        for field, value in changes:
            patch(path, field, value)

    build.__name__ = name
    return build


def short_extended_l1(path: Path) -> None:
    create(path, "-o", "extended_l2=on", size="1T")
    patch(path, L1_SIZE, 4095)


REFUSED = [
    (backed, "has a backing file, which QEMU would open as well; merge"),
    (backed_by_a_secret, "has a backing file, which QEMU would open as well; merge"),
    (backed_v2, "has a backing file, which QEMU would open as well; merge"),
    (data_file, "external data file, which QEMU would open as well; merge"),
    (raw_data_file, "external data file, which QEMU would open as well; merge"),
    (luks, "is encrypted; decrypt it"),
    (aes, "is encrypted; decrypt it"),
    (made_as("raw"), "is not a qcow2 image, but a file that begins with zeros"),
    (made_as("vmdk"), "is not a qcow2 image, but a VMDK; convert it"),
    (vmdk_in_pieces, "is not a qcow2 image, but a VMDK; convert it"),
    (made_as("vdi"), "is not a qcow2 image, but a VDI; convert it"),
    (made_as("vhdx"), "is not a qcow2 image, but a VHDX; convert it"),
    (made_as("vpc"), "is not a qcow2 image, but a VHD; convert it"),
    (made_as("qed"), "is not a qcow2 image, but a QED; convert it"),
    (made_as("qcow"), "is not a qcow2 image, but a QCOW of version 1; convert it"),
    (Path.touch, "is empty (0 bytes); download or copy it again"),
    (with_header("version_4", (VERSION, 4)), "is a qcow2 of version 4; only 2 and 3"),
    (with_header("corrupt", (INCOMPATIBLE, 2)), "is marked corrupt; repair it with qemu-img check"),
    (with_header("dirty_and_corrupt", (INCOMPATIBLE, 3)), "is marked corrupt; repair it"),
    (with_header("bit_5", (INCOMPATIBLE, 1 << 5)), "(incompatible feature bits 5); convert"),
    (with_header("bits", (INCOMPATIBLE, 1 << 63 | 33)), "(incompatible feature bits 5, 63); con"),
    (with_header("small_clusters", (CLUSTER_BITS, 8)), "(cluster or refcount size out of range)"),
    (with_header("large_clusters", (CLUSTER_BITS, 22)), "(cluster or refcount size out of range)"),
    (with_header("counts", (REFCOUNT_ORDER, 7)), "(cluster or refcount size out of range)"),
    (with_header("no_disk", (SIZE, 0)), "is a disk of 0 bytes"),
    (with_header("short_l1", (L1_SIZE, 2047)), "(the L1 table does not fit the disk's size)"),
    (short_extended_l1, "(the L1 table does not fit the disk's size)"),
    (with_header("long_l1", (L1_SIZE, 2**32 - 1)), "(the L1 table does not fit the disk's size)"),
    (with_header("longer", (SIZE, 1 << 41)), "(the L1 table does not fit the disk's size)"),
    (with_header("no_l1", (L1_OFFSET, 0)), "(a table is missing, or does not begin"),
    (with_header("odd_l1", (L1_OFFSET, 196609)), "(a table is missing, or does not begin"),
    (with_header("far_l1", (L1_OFFSET, 1 << 62)), "is truncated: it has "),
    (with_header("no_counts", (REFCOUNT_OFFSET, 0)), "(a table is missing, or does not begin"),
    (with_header("far_counts", (REFCOUNT_OFFSET, 1 << 40)), "is truncated: it has "),
    (
        with_header("long_counts", (REFCOUNT_CLUSTERS, 2**32 - 1)),
        "(the refcount table is too large",
    ),
]


@pytest.mark.parametrize(
    ("build", "sentence"), [pytest.param(*row, id=row[0].__name__) for row in REFUSED]
)
def test_what_qemu_must_not_see_is_refused_with_its_reason(
    tmp_path: Path, build: Callable[[Path], None], sentence: str
) -> None:
    path = tmp_path / "disk.qcow2"
    build(path)
    with pytest.raises(ImageError) as caught, open_image(path):
        pass
    message = str(caught.value)
    assert message.startswith(f"image {str(path)!r} ")
    assert sentence in message
    assert message.endswith(".")


def test_a_backing_file_is_found_whatever_else_the_header_says(tmp_path: Path) -> None:
    """No other fault of the header may let it pass, nor any length of the name that QEMU opens."""
    path = tmp_path / "disk.qcow2"
    backed_by_a_secret(path)
    for field, value in ((INCOMPATIBLE, 1), ((16, 4), 1), ((16, 4), 2**32 - 1), (VERSION, 2)):
        patch(path, field, value)
        with pytest.raises(Qcow2Error, match="backing file"):
            check_path(path)


def test_an_empty_name_is_not_a_backing_file(tmp_path: Path) -> None:
    """QEMU leaves such a name in a layer that has been flattened, and opens no file."""
    path = tmp_path / "disk.qcow2"
    backed_by_a_secret(path)
    patch(path, (16, 4), 0)
    check_path(path)
    info = ["qemu-img", "info", "--backing-chain", "--output=json", str(path)]
    chain = json.loads(subprocess.run(info, check=True, capture_output=True).stdout)
    assert [Path(image["filename"]) for image in chain] == [path]


# Hostile files


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid image of a few KiB."""
    path = tmp_path_factory.mktemp("small") / "disk.qcow2"
    create(path, "-o", "cluster_size=512", size="2M")
    write(path, ("0", "1k"), ("1M", "2k"))
    data = path.read_bytes()
    with in_memory(data) as fd:
        check(fd)
    return data


HEADER = [VERSION, BACKING, CLUSTER_BITS, SIZE, CRYPT, L1_SIZE, L1_OFFSET, REFCOUNT_OFFSET]
HEADER += [REFCOUNT_CLUSTERS, SNAPSHOTS, SNAPSHOT_OFFSET, INCOMPATIBLE, REFCOUNT_ORDER]
VALUES = st.one_of(
    st.integers(0, 64),
    st.sampled_from([512, 1024, 4096, 1 << 31, 1 << 62, 1 << 63]),
    st.integers(0, 2**64 - 1),
)
FIELDS = st.one_of(
    st.sampled_from(HEADER),
    st.integers(0, 8000).map(lambda offset: (offset // 8 * 8, 8)),
    st.integers(0, 8000).map(lambda offset: (offset, 1)),
)


@given(changes=st.lists(st.tuples(FIELDS, VALUES), max_size=4), size=st.none() | VALUES)
@settings(max_examples=1500)
def test_a_damaged_image_is_accepted_or_refused_and_nothing_else(
    small: bytes, changes: list[tuple[tuple[int, int], int]], size: int | None
) -> None:
    data = bytearray(small)
    for (offset, length), value in changes:
        data[offset : offset + length] = (value % (1 << 8 * length)).to_bytes(length, "big")
    with in_memory(bytes(data), None if size is None else size % (1 << 40)) as fd:
        try:
            header = check(fd)
        except Qcow2Error:
            return
    assert 0 < header.virtual_size < 1 << 64


@given(st.binary(max_size=600), st.sampled_from([b"", b"QFI\xfb", b"QFI\xfb\0\0\0\2" + bytes(8)]))
def test_noise_is_refused(noise: bytes, start: bytes) -> None:
    with in_memory(start + noise) as fd, pytest.raises(Qcow2Error):
        check(fd)


def crafted(*changes: tuple[tuple[int, int], int]) -> bytes:
    """The header of an empty disk with some of its fields changed."""
    header = bytearray(empty(TIB)[:512])
    for (offset, length), value in changes:
        header[offset : offset + length] = value.to_bytes(length, "big")
    return bytes(header)


@pytest.mark.parametrize("features", [0, DIRTY])
def test_tables_that_point_at_each_other_cost_no_time(features: int) -> None:
    """Half a million entries name one table of 2 MiB: read once each, that would be 1 TiB."""
    cluster = 2 * MIB
    header = crafted(
        *((CLUSTER_BITS, 21), (L1_SIZE, cluster // 8), (L1_OFFSET, cluster)),
        *((REFCOUNT_OFFSET, 2 * cluster), (REFCOUNT_CLUSTERS, 1), (INCOMPATIBLE, features)),
    )
    with in_memory(header, 4 * cluster) as fd:
        for table in (1, 2):
            os.pwrite(fd, struct.pack(">Q", 3 * cluster) * (cluster // 8), table * cluster)
        with at_most(3):
            check(fd)


def test_the_largest_tables_cost_little_memory() -> None:
    """32 MiB of L1 table and as much of reference counts, with no entry empty."""
    cluster = 2 * MIB
    header = crafted(
        *((CLUSTER_BITS, 21), (L1_SIZE, 4 * MIB), (L1_OFFSET, cluster)),
        *((REFCOUNT_OFFSET, 17 * cluster), (REFCOUNT_CLUSTERS, 16)),
    )
    with in_memory(header, 33 * cluster) as fd:
        for table in range(32):
            os.pwrite(fd, struct.pack(">Q", 1 << 40) * (cluster // 8), (1 + table) * cluster)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak_memory()
        with at_most(20), pytest.raises(Qcow2Error):
            check(fd)
    assert peak_memory() - before < 200 * MIB


def peak_memory() -> int:
    """The most that this process has had resident, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * KIB


# The base image stays as it is


def test_an_image_is_opened_for_reading_only_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    crashed(path)  # QEMU itself would repair this one
    before, data = path.stat(), path.read_bytes()
    with open_image(path) as image:
        assert fcntl.fcntl(image.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert not os.get_inheritable(image.fd)
        assert os.path.samestat(os.fstat(image.fd), before)
        assert (image.path, image.virtual_size) == (path, 3 * MIB)
    after = path.stat()
    assert path.read_bytes() == data
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert os.listdir(tmp_path) == ["disk.qcow2"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(image.fd)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("settled", [False, True])
def test_a_header_is_checked_again_after_each_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: bool, layer: bool
) -> None:
    if settled:
        monkeypatch.setattr("smolvm_async.foundation.files.SETTLED", 0)
    path = create(tmp_path / "disk.qcow2")
    checked: list[int] = []

    def counted(fd: int) -> Header:
        checked.append(fd)
        return check(fd)

    monkeypatch.setattr("smolvm_async.images.qcow2.check", counted)
    for number in range(3):
        if layer:
            os.link(path, tmp_path / str(number))
        with open_image(path, layer=layer) as image:
            assert image.virtual_size == GIB
    assert len(checked) == (1 if settled else 3)
    patch(path, SIZE, MIB)
    os.utime(path, ns=(0, 0))  # some kernels' clocks for files are slow
    with open_image(path, layer=layer) as image:
        assert image.virtual_size == MIB
    patch(path, VERSION, 9)
    os.utime(path, ns=(0, 1))
    with pytest.raises(ImageError), open_image(path, layer=layer):
        pass


def test_an_image_that_is_refused_is_closed_again(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    backed(path)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(ImageError), open_image(path):
        pass
    assert os.listdir("/proc/self/fd") == descriptors


# The empty overlay


@pytest.mark.parametrize(
    "size", [512, 64 * KIB, MIB + 512, 10 * GIB, 512 * MIB + 512, TIB, 64 * TIB, 2 * PIB]
)
def test_an_empty_overlay_is_a_sound_qcow2_to_qemu(tmp_path: Path, size: int) -> None:
    path = tmp_path / "overlay.qcow2"
    path.write_bytes(empty(size))
    info = json.loads(run("qemu-img", "info", "-f", "qcow2", "--output=json", path))
    assert info["virtual-size"] == size
    assert "backing-filename" not in info
    if size <= 64 * TIB:  # a check of more takes QEMU seconds
        found = json.loads(run("qemu-img", "check", "-f", "qcow2", "--output=json", path))
        assert found["check-errors"] == 0
        assert "leaks" not in found
        assert "corruptions" not in found
    write(path, ("0", "512"), (str(size - 512), "512"))
    assert check_path(path).virtual_size == size


@given(st.integers(1, 64 * TIB // 512).map(lambda sectors: sectors * 512))
@settings(max_examples=50)
def test_an_empty_overlay_passes_our_own_check(size: int) -> None:
    with in_memory(empty(size)) as fd:
        assert check(fd).virtual_size == size


def test_a_disk_that_no_overlay_can_hold_is_refused(tmp_path: Path) -> None:
    """With 2 MiB clusters a disk can be larger than an overlay of 64 KiB clusters."""
    path = create(tmp_path / "disk.qcow2", "-o", "cluster_size=2M", size="4P")
    overlay = tmp_path / "overlay.qcow2"
    try:
        size = check_path(path).virtual_size
    except Qcow2Error:
        return
    overlay.write_bytes(empty(size))
    run("qemu-img", "info", overlay)


PLAIN = ["", "-o compat=0.10", "-o cluster_size=512"]  # what is read without qemu-img


@pytest.mark.anyio
@pytest.mark.parametrize("options", [*PLAIN, "-c", "-o extended_l2=on"])
@pytest.mark.parametrize("content", [b"", b"\xfa boots \x55\xaa"])
async def test_the_first_sector_is_what_qemu_reads(
    tmp_path: Path, options: str, content: bytes
) -> None:
    raw, image = tmp_path / "raw", tmp_path / "qcow2"
    raw.write_bytes(content.ljust(1 << 20, b"\0"))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options.split(), raw, image)
    with open_file(image) as fd:
        check(fd)
        sector = first_sector(fd)
        assert sector in (None, content.ljust(512, b"\0"))
        assert sector is not None or options not in PLAIN
        assert await starts_by_bios(Path("qemu-img"), fd, "qcow2") is bool(content)
