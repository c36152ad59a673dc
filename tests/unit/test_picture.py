"""Pictures: what is refused, what is computed, and what a file holds, with Pillow as the judge."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import subprocess
import sys
import zlib
from dataclasses import FrozenInstanceError, replace
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvm_async import ConfigError, PictureError
from smolvm_async.controls.desktop.picture import Reference, Screenshot, load_picture
from tests.conftest import fill_up

WIDTH, HEIGHT = 4, 3
PIXELS = bytes(range(WIDTH * HEIGHT * 3))
PPM = b"P6\n4 3\n255\n" + PIXELS


def encoded(image: Image.Image, format_name: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_name)
    return buffer.getvalue()


IMAGE = Image.frombytes("RGB", (WIDTH, HEIGHT), PIXELS)
PNG = encoded(IMAGE)


def screenshot() -> Screenshot:
    return Screenshot.from_ppm(PPM, timestamp=1000.5, elapsed=0.25)


# What it is made from


@pytest.mark.parametrize("picture", [Screenshot.from_ppm(PPM), Screenshot.from_png(PNG)])
def test_both_forms_from_either(picture: Screenshot) -> None:
    assert picture.size == (picture.width, picture.height) == (WIDTH, HEIGHT)
    assert picture.pixels == PIXELS
    assert Image.open(BytesIO(picture.png)).tobytes() == PIXELS
    assert picture.png is picture.png
    assert picture.pixels is picture.pixels
    assert picture.image().tobytes() == PIXELS
    assert picture.image().mode == "RGB"
    assert picture._repr_png_() is picture.png


def test_a_png_is_kept_and_not_decoded_before_it_must() -> None:
    damaged = PNG[:45] + b"\0" * 10 + PNG[55:]
    picture = Screenshot.from_png(damaged)
    assert (picture.size, picture.png) == ((WIDTH, HEIGHT), damaged)
    with pytest.raises(PictureError, match="cannot be read"):
        _ = picture.pixels


def test_an_image_is_the_callers_own() -> None:
    picture = screenshot()
    picture.image().putpixel((0, 0), (255, 255, 255))
    assert picture.image().tobytes() == PIXELS


def test_what_is_cut_off_anywhere_is_refused() -> None:
    for length in range(len(PNG)):
        with pytest.raises(PictureError, match=r"not a PNG|cut off"):
            Screenshot.from_png(PNG[:length])
    for length in range(len(PPM)):
        with pytest.raises(PictureError, match=r"not a PPM|take 36"):
            Screenshot.from_ppm(PPM[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        PPM + b"\0",
        PNG,
        PPM.replace(b"P6", b"P5"),
        PPM.replace(b"255", b"65535"),
        PPM.replace(b"4 3", b"0 3"),
        PPM.replace(b"4 3", b"-4 3"),
        PPM.replace(b"4 3", b"4" * 5000 + b" 3"),
    ],
)
def test_what_is_no_ppm(data: bytes) -> None:
    with pytest.raises(PictureError, match="PPM"):
        Screenshot.from_ppm(data)


@pytest.mark.parametrize(
    "data", [PPM, encoded(IMAGE, "GIF"), PNG.replace(b"IHDR\0\0\0\4", b"IHDR\0\0\0\0")]
)
def test_what_is_no_png(data: bytes) -> None:
    with pytest.raises(PictureError, match="not a PNG"):
        Screenshot.from_png(data)


@settings(max_examples=300)
@given(st.binary(), st.integers(0, len(PNG)), st.integers(0, len(PNG)))
def test_a_damaged_png_is_refused_or_has_all_its_pixels(junk: bytes, start: int, end: int) -> None:
    with contextlib.suppress(PictureError):
        picture = Screenshot.from_png(PNG[:start] + junk + PNG[end:])
        assert len(picture.pixels) == picture.width * picture.height * 3


# What it is


def test_it_is_frozen_and_says_little() -> None:
    picture = screenshot()
    with pytest.raises(FrozenInstanceError):
        picture.width = 5  # type: ignore[misc]
    assert repr(picture) == "Screenshot(4x3, timestamp=1000.500, elapsed=0.250)"


def test_equal_is_what_shows_the_same() -> None:
    picture, later = screenshot(), Screenshot.from_png(PNG, timestamp=2000)
    assert picture == later
    assert len({picture, later}) == 1
    assert picture != Screenshot.from_ppm(PPM[:-1] + b"\0")
    assert picture != Screenshot.from_ppm(PPM.replace(b"4 3", b"3 4"))
    assert picture != PIXELS


@pytest.mark.parametrize("source", [screenshot(), Screenshot.from_png(PNG)])
def test_it_is_pickled_and_copied(source: Screenshot) -> None:
    for made in (pickle.loads(pickle.dumps(source)), copy.copy(source), copy.deepcopy(source)):
        assert made == source
        assert (made.timestamp, made.elapsed) == (source.timestamp, source.elapsed)
        assert made.png == source.png
    assert replace(source, timestamp=3.0).pixels == source.pixels


def test_pillow_is_imported_by_those_who_use_it() -> None:
    code = (
        "import sys, smolvm_async, smolvm_async.controls.desktop.comparison as c\n"
        "from smolvm_async.controls.desktop.picture import Screenshot\n"
        f"picture = Screenshot.from_ppm({PPM!r})\n"
        f"c.Comparison().differs(picture, Screenshot.from_ppm({PPM!r}))\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "smolvm_async.controls.desktop.picture" in done.stdout.split()
    assert "PIL" not in done.stdout.split()


# Files


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.ppm", "a.bmp", "a.tif"])
def test_a_saved_picture_is_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"what was there before")
    screenshot().save(path)
    assert load_picture(path) == screenshot()
    assert os.listdir(tmp_path) == [name]


def test_png_and_ppm_are_exactly_what_it_was_made_from(tmp_path: Path) -> None:
    Screenshot.from_png(PNG).save(tmp_path / "a.png")
    screenshot().save(str(tmp_path / "a.ppm"))
    assert (tmp_path / "a.png").read_bytes() == PNG
    assert (tmp_path / "a.ppm").read_bytes() == PPM


@pytest.mark.filterwarnings("ignore::DeprecationWarning:PIL")
def test_every_format_of_pillows_is_written_or_refused(tmp_path: Path) -> None:
    written = set()
    for suffix in Image.registered_extensions():
        path = tmp_path / f"a{suffix}"
        with contextlib.suppress(ConfigError):
            screenshot().save(path)
            written.add(path.name)
    assert {"a.jpg", "a.webp", "a.gif"} <= written == set(os.listdir(tmp_path))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    screenshot().save("~/a.png")
    assert load_picture("~/a.png") == screenshot()


def test_the_longest_name_that_a_file_can_have(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 251 + ".png")
    screenshot().save(path)
    assert load_picture(path) == screenshot()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/a.png", "No such file or directory"),
        ("file/a.png", "Not a directory"),
        ("directory.png", "Is a directory"),
        ("a" * 252 + ".png", "File name too long"),
        ("a", "ends in ''"),
        ("a.xyz", "ends in '.xyz'"),
        ("a\0.png", "NUL"),
    ],
)
def test_where_no_picture_can_be_saved(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory.png").mkdir()
    with pytest.raises(ConfigError, match=message) as caught:
        screenshot().save(f"{tmp_path}/{name}")
    assert str(caught.value).startswith("path=")
    assert sorted(os.listdir(tmp_path)) == ["directory.png", "file"]


@pytest.mark.parametrize("path", [None, "", 5, b"a.png"])
def test_what_is_no_path(path: str) -> None:
    with pytest.raises(ConfigError, match="pass the path of a picture"):
        screenshot().save(path)


def test_a_full_disk_keeps_what_was_there(small_disk: Path) -> None:
    path = small_disk / "a.ppm"
    screenshot().save(path)
    filler = fill_up(small_disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        Screenshot.from_ppm(b"P6\n300 300\n255\n" + bytes(270_000)).save(path)
    assert load_picture(path) == screenshot()
    assert sorted(os.listdir(small_disk)) == ["a.ppm", "filler"]
    filler.unlink()


# Pictures to compare with


@pytest.mark.parametrize(
    "reference",
    [
        screenshot(),
        IMAGE,
        IMAGE.convert("RGBA"),
        PNG,
        encoded(IMAGE, "BMP"),
        encoded(Image.frombytes("RGB", (WIDTH, HEIGHT), PIXELS).quantize(256)),
    ],
)
def test_a_reference_may_be_many_things(reference: Reference) -> None:
    assert load_picture(reference) == screenshot()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("absent.png", "is not a file"),
        (".", "is not a file"),
        ("fifo", "is not a file"),
        ("/proc/self/mem", "cannot be read"),
        ("~nobody-at-all/a.png", "names a user who does not exist"),
        ("text", "not a picture that Pillow knows"),
        (b"", "not a picture that Pillow knows"),
        (PNG[:50], "cannot be read"),
        (None, "pass the path of a picture, or the picture itself"),
        (5, "pass the path of a picture, or the picture itself"),
    ],
)
def test_what_is_no_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Reference, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("text").write_text("no picture")
    with pytest.raises(ConfigError, match=f"^like=.*{message}"):
        load_picture(reference)


def test_a_huge_picture_is_refused_before_it_takes_memory() -> None:
    size = (2**16).to_bytes(4)
    header = b"IHDR" + size + size + PNG[24:29]
    bomb = PNG[:12] + header + zlib.crc32(header).to_bytes(4) + PNG[33:]
    with pytest.raises(PictureError, match=r"cannot be read .* exceeds limit"):
        _ = Screenshot.from_png(bomb).pixels
