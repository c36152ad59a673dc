"""Paths in a guest, and the names that Windows refuses."""

from __future__ import annotations

from pathlib import PurePosixPath
from stat import S_IFREG

import pytest

from smolvm_async import ConfigError
from smolvm_async.controls.files.paths import (
    MOST,
    check_guest_path,
    check_windows_tree,
    name_of,
    name_problem,
    without_slash,
)
from smolvm_async.controls.files.tree import Entry


@pytest.mark.parametrize(
    ("path", "kept", "name"),
    [
        (r"C:\Users\me\data.csv", "C:/Users/me/data.csv", "data.csv"),
        (f"C:\\{'x' * (MOST - 3)}", f"C:/{'x' * (MOST - 3)}", "x" * (MOST - 3)),
        ("d:/mixed\\//slashes", "d:/mixed/slashes", "slashes"),
        ("C:\\Temp\\", "C:/Temp/", "Temp"),
        ("C:\\", "C:/", ""),
        (
            "C:/Program Files/caf\u00e9 (x86)/.hidden",
            "C:/Program Files/caf\u00e9 (x86)/.hidden",
            ".hidden",
        ),
    ],
)
def test_a_path_of_windows_has_slashes(path: str, kept: str, name: str) -> None:
    assert check_guest_path(path, windows=True) == kept
    assert name_of(kept) == name
    assert without_slash(kept) == (kept if not name else kept.rstrip("/"))
    check_windows_tree([Entry("", S_IFREG, 0, 0)], kept)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/root/x", "with its drive"),
        ("C:data", "with its drive"),
        (r"\\server\share\x", "with its drive"),
        (r"\\?\C:\x", "with its drive"),
        (PurePosixPath("relative"), "with its drive"),
        (b"C:/x", "with its drive"),
        (r"C:\a\..\b", "dot or a space"),
        (r"C:\a.\b", "dot or a space"),
        ("C:\\a \\b", "dot or a space"),
        (r"C:\nul", "name of a device"),
        (r"C:\x\Com1.txt", "name of a device"),
        (r"C:\LPT¹", "name of a device"),
        (r"C:\CONIN$", "name of a device"),
        (r"C:\CON .tar.gz", "name of a device"),
        (r"C:\a:stream", "':' is not allowed"),
        ("C:\\a\nb", "is not allowed"),
        ("C:\\a\ud800", "is not allowed"),
        ("C:\\" + "x" * MOST, f"more than {MOST} characters"),
    ],
)
def test_a_path_that_windows_refuses_is_an_error_at_once(path: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        check_guest_path(path, windows=True)
    assert str(caught.value).startswith("guest_path=")


@pytest.mark.parametrize(
    "name", ["COM10", "console", "nul0", "a.b", ".a", "COM0", "aux-x", "x" * 200]
)
def test_names_that_only_look_reserved_are_allowed(name: str) -> None:
    assert name_problem(name) == ""


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a", "a/aux.h"], "name of a device"),
        (["Makefile", "makefile"], "the same name"),
        (["a", "a/b "], "dot or a space"),
        (["x" * 250], "its path would have more"),
    ],
)
def test_a_tree_that_windows_cannot_keep_is_refused(names: list[str], reason: str) -> None:
    tree = [Entry(name, S_IFREG | 0o644, 0, 0) for name in ("", *names)]
    with pytest.raises(ConfigError, match=reason):
        check_windows_tree(tree, "C:/target/of/it")
