"""Manifests of published images, the URIs they are at, and what of a file has arrived."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvm_async import AsyncSmolVM, ConfigError, ImageError
from smolvm_async.config.uri import parse_uri
from smolvm_async.images.cache.layout import Layout, Published, cache_root
from smolvm_async.images.cache.verifier import Verifier, WrongContentError
from smolvm_async.images.manifest import MAX_MANIFEST, Manifest, parse_manifest
from smolvm_async.images.s3.partial_file import Ranges, read_journal, write_journal

DIGEST, OTHER = "a" * 64, "b" * 64

OWN: dict[str, Any] = {
    "schema_version": 1,
    "name": "debian-12",
    "os": "linux",
    "rootfs": {"name": "disk.qcow2", "sha256": DIGEST, "size": 1000, "format": "qcow2"},
    "kernel": {"name": "vmlinuz", "sha256": OTHER, "size": 10},
}
SYNCHRONOUS: dict[str, Any] = {
    "name": "alpine",
    "kernel": "vmlinux.bin",
    "kernel_sha256": DIGEST,
    "rootfs": "rootfs.ext4",
    "rootfs_sha256": OTHER,
    "initrd": "initrd.img",
    "initrd_sha256": "c" * 64,
    "boot_args": "console=ttyS0 root=/dev/vda",
}


def parsed(values: object) -> Manifest:
    return parse_manifest(json.dumps(values).encode(), "s3://bucket/x")


def with_disk(**changes: object) -> dict[str, Any]:
    return {**OWN, "rootfs": {**OWN["rootfs"], **changes}}


def test_our_own_schema_is_read() -> None:
    manifest = parsed({**OWN, "memory": 800, "cpus": 2, "boot_args": "quiet"})
    assert (manifest.name, manifest.os, manifest.memory, manifest.cpus) == (
        *("debian-12", "linux", 800, 2),
    )
    assert list(manifest.files) == ["kernel", "rootfs"]
    assert manifest.rootfs.digest == DIGEST


def test_the_synchronous_packages_schema_is_read_as_linux(
    caplog: pytest.LogCaptureFixture,
) -> None:
    manifest = parsed({**SYNCHRONOUS, "sbx": {"agent": "pi"}})
    assert manifest.os == "linux"
    names = {part: file.name for part, file in manifest.files.items()}
    assert names == {"kernel": "vmlinux.bin", "initrd": "initrd.img", "rootfs": "rootfs.ext4"}
    assert manifest.files["rootfs"].sha256 == OTHER
    assert manifest.boot_args == "console=ttyS0 root=/dev/vda"
    assert caplog.messages == ["s3://bucket/x has unknown fields, which are ignored: 'sbx'"]


def test_a_windows_image_has_a_disk_alone() -> None:
    windows = {**OWN, "os": "windows"}
    del windows["kernel"]
    assert parsed(windows).os == "windows"


def test_unknown_fields_are_reported_by_where_they_are_and_not_kept(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    deep: Any = "\ud800"
    for _ in range(400):
        deep = {"\ud800": [deep]}
    manifest = parsed({**with_disk(owner="me"), "future": deep})
    assert caplog.messages == [
        "s3://bucket/x has unknown fields, which are ignored: 'future', 'rootfs.owner'"
    ]
    assert manifest == parsed(with_disk())
    layout = Layout(tmp_path)
    layout.make()
    layout.write_record(Published("s3://bucket/x", "", manifest), tmp_path / "record")
    assert b"future" not in (tmp_path / "record").read_bytes()


def test_what_is_compressed_is_kept_by_its_content() -> None:
    file = parsed(with_disk(compression="zstd", content_sha256=OTHER, content_size=9999)).rootfs
    assert (file.digest, file.cached_size) == (OTHER, 9999)


NAMES = [
    *("/etc/passwd", "../disk", "a/../../b", "a//b", "./a", "a/", "", ".", "..", "C:\\x", "C:x"),
    *("a\\b", "a\0b", "a\nb", "x" * 201, "smolvm-image.json", "a/smolvm-image.json", "\ud800"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ImageError, match="not a valid manifest"):
        parsed(with_disk(name=name))
    with pytest.raises(ImageError, match="not a valid manifest"):
        parsed({**SYNCHRONOUS, "kernel": name})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "not a JSON object"),
        ({}, "schema_version"),
        ({**OWN, "schema_version": 2}, "newer version"),
        ({**OWN, "schema_version": "1"}, "schema_version"),
        ({**OWN, "os": "plan9"}, "os must be one of"),
        ({**OWN, "os": "windows"}, "boot loader"),
        ({**OWN, "name": ""}, "name"),
        ({**OWN, "name": "a\x1b[31m"}, "cannot be shown"),
        ({**OWN, "memory": 0}, "memory"),
        ({**OWN, "memory": True}, "memory"),
        ({**OWN, "cpus": 1 << 40}, "cpus"),
        ({**OWN, "boot_args": "a\nb"}, "boot_args"),
        ({**OWN, "boot_args": "x" * 3000}, "boot_args"),
        ({**OWN, "kernel": None, "boot_args": "x"}, "need a kernel"),
        ({**OWN, "kernel": OWN["rootfs"]}, "same name"),
        ({**OWN, "kernel": {**OWN["kernel"], "format": "raw"}}, "only rootfs"),
        ({**OWN, "kernel": {**OWN["kernel"], "size": 1 << 30}}, "larger than"),
        (with_disk(sha256="A" * 64), "sha256"),
        (with_disk(sha256=f"{DIGEST}\n"), "sha256"),
        (with_disk(size=0), "size"),
        (with_disk(size=1 << 50), "size"),
        (with_disk(size=1.5), "size"),
        (with_disk(size=None), "no size"),
        (with_disk(format="vmdk"), "format"),
        (with_disk(format=None), "no format"),
        (with_disk(compression="gzip"), "compression"),
        (with_disk(compression="zstd"), "compression needs"),
        (with_disk(content_size=4), "need a compression"),
        ({**SYNCHRONOUS, "rootfs_sha256": None}, "no rootfs_sha256"),
        ({**SYNCHRONOUS, "kernel": None}, "no kernel"),
        ({**SYNCHRONOUS, "kernel": 5}, "kernel"),
        ({**SYNCHRONOUS, "kernel": "rootfs.ext4"}, "same name"),
        ({**SYNCHRONOUS, "kernel": "x/rootfs.ext4"}, "same name"),
    ],
)
def test_what_is_wrong_is_told(values: object, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        parsed(values)
    assert words in str(caught.value)
    assert "s3://bucket/x" in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', b"NaN", b"9" * 5000),
        *(b" " * (MAX_MANIFEST + 1), b'{"a": 1e999}'),
    ],
    ids=range(9),
)
def test_what_is_no_json_is_told(content: bytes) -> None:
    with pytest.raises(ImageError, match="not a valid manifest"):
        parse_manifest(content, "s3://bucket/x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
fields = st.sampled_from(
    [*OWN, *SYNCHRONOUS, "initrd", "memory", "cpus", "files", "unknown", "model_extra", "__class__"]
)


@settings(max_examples=300)
@given(
    st.sampled_from([OWN, SYNCHRONOUS]),
    st.dictionaries(fields | st.text(max_size=8), json_values, max_size=3),
    st.dictionaries(
        st.sampled_from([*OWN["rootfs"], "compression", "content_size", "digest"]),
        json_values,
        max_size=2,
    ),
)
def test_hostile_fields_are_refused_or_harmless(
    base: dict[str, Any], changes: dict[str, Any], disk: dict[str, Any]
) -> None:
    values = {**base, **changes}
    if isinstance(values.get("rootfs"), dict):
        values["rootfs"] = {**values["rootfs"], **disk}
    try:
        manifest = parsed(values)
    except ImageError:
        return
    names = [file.name for file in manifest.files.values()]
    assert len(set(names)) == len(names)
    for name in names:
        assert not name.startswith("/")
        assert ".." not in name.split("/")
    # What goes into the cache's record comes out of it again.
    assert Manifest.model_validate(json.loads(manifest.model_dump_json())) == manifest


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_hostile_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ImageError):
        parse_manifest(content, "s3://bucket/x")


# URIs


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("s3://bucket/images/debian/", "images/debian/smolvm-image.json"),
        ("s3://bucket/images/debian", "images/debian/smolvm-image.json"),
        ("s3://bucket", "smolvm-image.json"),
        ("S3://bucket/", "smolvm-image.json"),
        ("s3://bucket/a/my.json", "a/my.json"),
    ],
)
def test_a_uri_means_a_manifest(uri: str, key: str) -> None:
    location = parse_uri(uri)
    assert (location.bucket, location.key) == ("bucket", key)
    assert location.beside("disk").key == f"{key.rpartition('/')[0]}/disk".lstrip("/")


@pytest.mark.parametrize(
    "uri",
    [
        *("s3://", "s3:///x", "s3://UPPER/x", "s3://b/x", "s3://bucket/../x", "s3://bucket/x?y"),
        *("s3://bucket/x#y", "s3://bucket/\n", "s3://bucket/" + "x" * 1025, "s3://user@bucket/x"),
    ],
)
def test_a_malformed_uri_is_refused_at_once(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pass|at most"):
        AsyncSmolVM(image=uri, data_dir=tmp_path / "data")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"os": "linux"}, "os="),
        ({"kernel": "/vmlinuz"}, "kernel="),
        ({"initrd": "/initrd"}, "initrd="),
        ({"boot_args": "quiet"}, "boot_args="),
    ],
)
def test_what_the_manifest_records_cannot_be_given(
    arguments: dict[str, Any], word: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{word}.*manifest.*leave"):
        AsyncSmolVM(image="s3://bucket/x/", data_dir=tmp_path / "data", **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"memory": 1}, {"memory": "1"}, {"cpus": 0}, {"user": 5}, {"env": 5}, {"accel": "x"}],
)
def test_what_is_wrong_for_every_guest_is_refused_at_once(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        AsyncSmolVM(image="s3://bucket/x/", data_dir=tmp_path / "data", **arguments)


# What has arrived


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=12))
def test_ranges_are_what_a_set_of_bytes_would_be(pairs: list[tuple[int, int]]) -> None:
    ranges, there = Ranges(), set()
    for start, length in pairs:
        ranges.add(start, start + length)
        there |= set(range(start, start + length))
    missing = {at for start, end in ranges.gaps(60) for at in range(start, end)}
    assert missing == set(range(60)) - there
    assert ranges.total == len(there)
    assert ranges.prefix == min(set(range(61)) - there)


def test_a_journal_is_read_back_and_nonsense_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_journal(path, '"tag"', 100, Ranges([(0, 10), (50, 60)]))
    etag, ranges = read_journal(path, 100)
    assert (etag, ranges.to_list()) == ('"tag"', [(0, 10), (50, 60)])
    assert read_journal(path, 99)[1].total == 0
    for nonsense in (b"", b"{}", b"[]", b'{"etag":"","size":100,"ranges":[[5,500]]}', b"\xff"):
        path.write_bytes(nonsense)
        assert read_journal(path, 100)[1].total == 0
    assert os.listdir(tmp_path) == ["x.json"]


def zstd(content: bytes, level: int = 3, window: int = 0) -> bytes:
    from backports.zstd import CompressionParameter, compress

    options: dict[int, int] = {CompressionParameter.compression_level: level}
    if window:
        options[CompressionParameter.window_log] = window
    return compress(content, options=options)


def read(tmp_path: Path, packed: bytes, content: bytes, *, more: int = 0) -> bytes:
    """Return the content of a compressed file, read in uneven strides."""
    path, out = tmp_path / "part", tmp_path / "out"
    path.write_bytes(packed)
    file = parsed(
        with_disk(
            sha256=hashlib.sha256(packed).hexdigest(),
            size=len(packed),
            compression="zstd",
            content_sha256=hashlib.sha256(content).hexdigest(),
            content_size=len(content) + more,
        )
    ).rootfs
    verifier = Verifier(path, file, out, "s3://bucket/disk")
    try:
        for end in (len(packed) // 3, len(packed) // 2, len(packed)):
            verifier.read_to(end)
        verifier.check()
    finally:
        verifier.close()
    return out.read_bytes()


def test_zstd_is_decompressed_and_zeroes_become_holes(tmp_path: Path) -> None:
    content = os.urandom(70_000) + bytes(9 << 20) + os.urandom(3) + bytes(1 << 20)
    assert read(tmp_path, zstd(content), content) == content
    assert (tmp_path / "out").stat().st_blocks * 512 < 1 << 20


def test_frames_one_after_another_are_one_file(tmp_path: Path) -> None:
    one, two = os.urandom(100_000), bytes(5000)
    assert read(tmp_path, zstd(one) + zstd(two), one + two) == one + two


def test_more_than_was_promised_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(WrongContentError, match="more than"):
        read(tmp_path, zstd(bytes(64 << 20)), bytes(1 << 20))


def test_less_than_was_promised_is_not_filled_up(tmp_path: Path) -> None:
    with pytest.raises(WrongContentError, match="has 1000 bytes, but the manifest says 1001"):
        read(tmp_path, zstd(bytes(1000)), bytes(1000), more=1)


def test_damaged_and_truncated_and_greedy_zstd_is_refused(tmp_path: Path) -> None:
    content = os.urandom(200_000)
    packed = zstd(content)
    with pytest.raises(WrongContentError, match="is cut off inside"):
        read(tmp_path, packed[:-50], content)
    with pytest.raises(WrongContentError, match="decompressed"):
        read(tmp_path, b"garbage!" + packed, content)
    large = os.urandom(9 << 20)
    with pytest.raises(WrongContentError, match="8 MiB"):
        read(tmp_path, zstd(large * 2, window=27), large * 2)


# The cache's directory


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMOLVM_IMAGE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "smolvm-async" / "images"
    monkeypatch.setenv("SMOLVM_IMAGE_DIR", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    assert cache_root(tmp_path / "given") == tmp_path / "given"


def test_a_record_says_what_was_published_and_damage_makes_it_none(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.make()
    published = Published("s3://bucket/x", "", parsed({**with_disk(owner="me")}))
    path = layout.record_path(published.uri, published.endpoint)
    layout.write_record(published, path)
    record = layout.read_record(path)
    assert record is not None
    assert record.published == published
    path.write_bytes(b"{")
    assert layout.read_record(path) is None
    assert list(layout.records()) == []
