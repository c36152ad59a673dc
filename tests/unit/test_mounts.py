"""The argument `mounts=`: paths are taken apart, and unusable ones refused before QEMU."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from smolvm_async.config.mounts import Mount, check_mounts
from smolvm_async.config.options import make_clone_config, make_config
from smolvm_async.errors import ConfigError, UnsupportedError
from smolvm_async.host.shares import check_shares, open_share


@contextmanager
def refused(phrase: str) -> Iterator[None]:
    with pytest.raises(ConfigError, match="mounts") as caught:
        yield
    assert phrase in str(caught.value)


def test_entries_name_source_target_and_whether_the_guest_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert check_mounts(["~/a", "b:/mnt/b:rw", "/c:/mnt/c", Path("/d/../e"), "/f:rw"]) == (
        Mount(Path("/home/me/a"), "/workspace/a"),
        Mount(tmp_path / "b", "/mnt/b", True),
        Mount(Path("/c"), "/mnt/c"),
        Mount(Path("/d/../e"), "/workspace/e"),
        Mount(Path("/f"), "/workspace/f", True),
    )
    assert [mount.writable for mount in check_mounts(["/a", "/b:ro"], True)] == [True, False]


def test_a_configuration_has_complete_entries_which_are_read_again_and_no_clone_inherits() -> None:
    config = make_config(mounts=["/a b,c", "/d:/e"], writable_mounts=True)
    assert config.mounts == ("/a b,c:/workspace/a b,c:rw", "/d:/e:rw")
    assert tuple(map(str, check_mounts(config.mounts))) == config.mounts
    assert make_clone_config(config).mounts == ()
    assert make_clone_config(config, mounts=["/f"]).mounts == ("/f:/workspace/f:ro",)


@pytest.mark.parametrize(
    "target",
    [
        *("mnt", "", "/", "//a", "/mnt/", "/mnt/../etc", "/mnt/./a", "/etc/x", "/proc", "/dev/shm"),
        *("/home", "/usr/share", "/workspace", "/a\n", "/a\0b", "C:\\x", "/a:/b", "/a:rx"),
        *(f"/{'a' * 256}", "/a" * 2048),
    ],
)
def test_an_unusable_guest_path_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="mounts: "):
        check_mounts([f"/srv:{target}"])


@pytest.mark.parametrize("second", ["/mnt/a", "/mnt/a/b", "/mnt"])
def test_equal_and_nested_guest_paths_are_refused(second: str) -> None:
    with pytest.raises(ConfigError, match="mounts: "):
        check_mounts(["/x:/workspace/x/a", "/y:/opt/y", "/z:/mnt/a", f"/srv:{second}"])


@pytest.mark.parametrize("mounts", ["/a", b"/a", 3, None, {"/a": "/b"}, ["/a"] * 9, [3], [b"/a"]])
def test_mounts_of_another_form_are_refused(mounts: object) -> None:
    with pytest.raises(ConfigError, match="mounts"):
        check_mounts(mounts)


def test_a_host_directory_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    data_dir = tmp_path / "vms"
    data_dir.mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("vms")

    for source, phrase in {
        f"{tmp_path}/none": "does not exist",
        f"{tmp_path}/file": "upload_file()",
        f"{tmp_path}/file/x": "not a directory",
        f"{tmp_path}/link": "files of VMs",
        f"{tmp_path}/vms/..": "files of VMs",
        "/": "whole host",
        "/proc/self/root": "whole host",
        "/proc/self": "not a directory of files",
        "/sys/kernel": "not a directory of files",
    }.items():
        with refused(phrase):
            check_shares([Mount(Path(source), "/x")], data_dir)


def test_only_a_writable_directory_needs_extended_attributes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "")

    shared = tmp_path / "shared"
    shared.mkdir()
    check_shares([Mount(shared, "/x", True)], tmp_path / "vms")
    monkeypatch.setattr(os, "getxattr", refuse)
    check_shares([Mount(shared, "/x")], tmp_path / "vms")
    with refused("extended attributes"):
        check_shares([Mount(shared, "/x", True)], tmp_path / "vms")


def test_qemu_gets_a_descriptor_and_never_a_path(tmp_path: Path) -> None:
    strange = tmp_path / "a,readonly=off,path=x"
    strange.mkdir()
    share = open_share(Mount(strange, "/x"), tmp_path / "vms")
    try:
        assert os.path.samestat(os.fstat(share.fd), strange.stat())
        assert not share.writable
    finally:
        os.close(share.fd)


def test_windows_names_another_way() -> None:
    with pytest.raises(UnsupportedError, match="mounts= is not available for Windows") as caught:
        make_config(os="windows", image="x.qcow2", mounts=["/srv"])
    assert "upload_file()" in str(caught.value)
