"""Typing on keyboard layouts: each stroke is tried on a keyboard of libxkbcommon's."""

from __future__ import annotations

import functools
import json
import string
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolvm_async.controls.desktop import layouts
from smolvm_async.controls.desktop.keys import KEYS
from smolvm_async.controls.desktop.layouts import LAYOUTS, Stroke, chord, strokes
from smolvm_async.errors import ConfigError
from tests.layouts import generate, xkb

PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
EVDEV = {key.qcode: key.evdev for key in KEYS}
FILE = json.loads(Path(layouts.__file__).with_name("layouts.json").read_text("utf-8"))

needs_xkb = pytest.mark.skipif(bool(xkb.missing()), reason=xkb.missing())


def same_sources() -> bool:
    return not xkb.missing() and xkb.sources() == FILE["sources"]


@functools.cache
def keyboard(layout: str) -> xkb.Keyboard:
    return xkb.Keyboard(*generate.LAYOUTS[layout])


def type_on(layout: str, typed: list[Stroke]) -> str:
    """Return the text that a Linux program reads."""
    there = keyboard(layout)
    there.reset()
    text = "".join([there.stroke([EVDEV[qcode] for qcode in stroke]) for stroke in typed])
    assert not there.waits()
    return text


def characters(layout: str) -> str:
    """Return all characters that a layout types, without the line breaks."""
    return "".join(char for char in layouts._table(layout) if char not in "\n\r\t")


# The layouts


@needs_xkb
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_keyboard_with_the_layout_types_each_character(layout: str) -> None:
    """Another version of xkeyboard-config may differ, but in nothing that is ASCII."""
    for char in characters(layout) if same_sources() else PRINTABLE:
        assert type_on(layout, strokes(char, layout)) == char
    assert type_on(layout, strokes("\t\n\r\n\r", layout)) == "\t\r\r\r"


@needs_xkb
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_long_text_arrives(layout: str) -> None:
    """Nothing of one character is left for the next: no dead key waits, no modifier is down."""
    text = PRINTABLE * 2 if not same_sources() else characters(layout) + characters(layout)[::-1]
    assert type_on(layout, strokes(text, layout)) == unicodedata.normalize("NFC", text)


@needs_xkb
def test_the_file_is_what_the_generator_makes() -> None:
    if not same_sources():
        pytest.skip(f"the file is of {FILE['sources']}, this host has {xkb.sources()}")
    assert generate.TARGET.read_text("utf-8") == generate.generated()


def test_the_names_are_those_of_the_file() -> None:
    assert list(LAYOUTS) == list(FILE["layouts"]) == list(generate.LAYOUTS)
    assert len(set(LAYOUTS)) == len(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_types_ascii(layout: str) -> None:
    assert len(strokes(PRINTABLE, layout)) >= len(PRINTABLE)


LATIN_1 = {char for char in map(chr, range(0xA0, 0x100)) if char.isalpha()}


@pytest.mark.parametrize(
    ("layout", "lacking"),
    [
        ("us-intl", "ªº"),
        ("gb", ""),
        ("de", "ÃÑÕãñõ"),
        ("fr", "ÃÇÑÕãñõ"),
        ("es", "ÃÕãõ"),
        ("se", ""),
    ],
)
def test_which_letters_of_latin_1_a_layout_lacks(layout: str, lacking: str) -> None:
    assert LATIN_1 - set(characters(layout)) <= set(lacking)


def test_only_the_main_block_types() -> None:
    allowed = {*generate.QCODES, "shift", "alt_r", "ret", "tab"}
    for layout in LAYOUTS:
        for ways in layouts._table(layout).values():
            assert 1 <= len(ways) <= 2
            for *modifiers, key in ways:
                assert modifiers in ([], ["shift"], ["alt_r"], ["shift", "alt_r"])
                assert {*modifiers, key} <= allowed


@pytest.mark.parametrize(
    ("text", "layout", "expected"),
    [
        ("<|", "us", "shift+comma shift+backslash"),  # never the key that US keyboards lack
        ("\\|#", "gb", "less shift+less backslash"),
        ("@€{[]}\\|~", "de", "q e 7 8 9 0 minus less bracket_right"),
        ("@#{[|\\^]}", "fr", "0 3 4 5 6 8 9 minus equal"),
        (
            "|@#[]{}\\€",
            "es",
            "1 2 3 bracket_left bracket_right apostrophe backslash grave_accent e",
        ),
        ("@#[]", "it", "semicolon apostrophe bracket_left bracket_right"),
        ("@|[]{}\\", "ch", "2 7 bracket_left bracket_right apostrophe backslash less"),
        ("|@#^{}[]\\", "be", "1 2 3 6 9 0 bracket_left bracket_right less"),
        ("@#&[]{}<>*", "cz", "v x c f g b n comma dot slash"),
        ("@|\\[]{}", "hu", "v w q f g b n"),
        ("@\\", "latam", "q minus"),
        ("ąćęłńóśźż", "pl", "a c e l n o s x z"),
    ],
)
def test_a_character_is_where_windows_has_it_too(text: str, layout: str, expected: str) -> None:
    altgr = layout not in ("us", "gb")
    wanted = [
        ("alt_r", *key.split("+")) if altgr else (*key.split("+"),) for key in expected.split()
    ]
    assert strokes(text, layout) == wanted


@pytest.mark.parametrize("layout", ["us-intl", "br"])
def test_accents_with_a_space_where_windows_has_nothing_behind_altgr(layout: str) -> None:
    for accent in "~^`":
        *_, (_, last) = [strokes(accent, layout)]
        assert last == ("spc",)
    assert not any("alt_r" in stroke for stroke in strokes('Don\'t say "no"!', layout))


# strokes()


@pytest.mark.parametrize(
    ("text", "layout", "expected"),
    [
        ("", "us", []),
        ("aA1!", "us", [("a",), ("shift", "a"), ("1",), ("shift", "1")]),
        ("a\r\nb\nc\rd\te", "us", [*"a↵b↵c↵d⇥e"]),
        ("zy", "de", ["y", "z"]),
        ("e\u0301", "fr", [("2",)]),  # é, put together
        ("ê", "fr", [("bracket_left",), ("e",)]),
        ("^", "de", [("grave_accent",), ("spc",)]),
    ],
)
def test_strokes(text: str, layout: str, expected: list[Stroke | str]) -> None:
    names = {"↵": "ret", "⇥": "tab"}
    wanted = [(names.get(each, each),) if isinstance(each, str) else each for each in expected]
    assert strokes(text, layout) == wanted


@pytest.mark.parametrize(
    ("text", "layout", "pattern"),
    [
        (
            "ab ö",
            "us",
            r"'us' cannot type 'ö' \(LATIN SMALL LETTER O WITH DIAERESIS\), at position 3",
        ),
        (
            "e\u0301\r\n漢",
            "fr",
            r"'漢' \(CJK UNIFIED IDEOGRAPH-6F22\), at position 4.*no known layout",
        ),
        ("\ud83d", "us", r"'\\ud83d' \(half of a surrogate pair"),
        ("a\x1b", "us", r"'\\x1b' \(a control"),
        ("a\x00b", "de", "position 1"),
        ("\N{ZERO WIDTH JOINER}", "de", "ZERO WIDTH JOINER"),
        ("ß", "us", r"\(.*\bde, at\b.*\)"),
        (None, "us", "pass a str"),
        (b"abc", "us", "pass a str"),
    ],
)
def test_what_cannot_be_typed(text: str, layout: str, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        strokes(text, layout)
    str(caught.value).encode()


@pytest.mark.parametrize("layout", ["", "US", "english", None, 3, ["us"], "x" * 10_000])
def test_an_unknown_layout_names_those_there_are(layout: str) -> None:
    for function in (strokes, chord):
        with pytest.raises(ConfigError, match="The layouts are us, us-intl") as caught:
            function("a", layout)
        assert len(str(caught.value)) < 800


def test_a_megabyte_takes_no_time() -> None:
    text = "Grüße aus Köln, fast 1 MB;\r\n" * 36_000
    started = time.process_time()
    assert len(strokes(text, "de")) == len(text) - 36_000
    with pytest.raises(ConfigError, match=f"position {len(text)} "):
        strokes(text + "漢", "de")
    assert time.process_time() - started < 3, "some 0.2 s of processor time"


@given(st.text(), st.sampled_from(LAYOUTS))
def test_any_text_is_typed_or_a_config_error(text: str, layout: str) -> None:
    try:
        typed = strokes(text, layout)
    except ConfigError as error:
        str(error).encode()
        normal = unicodedata.normalize("NFC", text)
        assert set(normal) - set(characters(layout))
    else:
        assert len(typed) >= len(unicodedata.normalize("NFC", text).replace("\r\n", "\n"))


@needs_xkb
@given(st.data())
def test_what_can_be_typed_arrives(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS))
    alphabet = characters(layout) if same_sources() else PRINTABLE
    text = data.draw(st.text(alphabet))
    assert type_on(layout, strokes(text, layout)) == unicodedata.normalize("NFC", text)


def test_layouts_are_read_on_first_use() -> None:
    script = (
        "from smolvm_async.controls.desktop import layouts as l; "
        "assert not l._data.cache_info().currsize and l.LAYOUTS; "
        "l.strokes('a', 'us'); assert l._data.cache_info().currsize"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# chord()


@pytest.mark.parametrize(
    ("text", "layout", "expected"),
    [
        ("ctrl+alt+delete", "us", "ctrl alt delete"),
        ("Control+Shift+KeyT", "us", "ctrl shift t"),
        ("ctrl + c", "us", "ctrl c"),
        ("ctrl+ö", "de", "ctrl semicolon"),
        ("ctrl+o\u0308", "de", "ctrl semicolon"),
        ("ctrl+z", "de", "ctrl y"),
        ("ctrl+KeyZ", "de", "ctrl z"),
        ("ctrl+a", "fr", "ctrl q"),
        ("A", "us", "shift a"),
        ("shift+A", "us", "shift a"),
        ("Ctrl+C", "us", "ctrl c"),  # as menus write it
        ("ctrl+shift+C", "us", "ctrl shift c"),
        ("win+E", "us", "meta_l e"),
        ("ctrl++", "us", "ctrl shift equal"),
        ("ctrl++", "de", "ctrl bracket_right"),
        ("ctrl+++a", "de", "ctrl bracket_right a"),
        ("+", "us", "shift equal"),
        ("ctrl+plus", "us", "ctrl shift equal"),
        ("ctrl+minus", "de", "ctrl slash"),
        ("ctrl+/", "de", "ctrl shift 7"),
        ("ctrl+shift+/", "de", "ctrl shift 7"),
        ("ctrl+@", "de", "ctrl alt_r q"),
        ("ctrl+Backquote", "de", "ctrl grave_accent"),
        ("ctrl+ ", "us", "ctrl spc"),
        (" ", "us", "spc"),
        ("\n", "us", "ret"),
        ("shift+\t", "us", "shift tab"),
        ("super", "us", "meta_l"),
        ("KP_Page_Down", "us", "kp_3"),
    ],
)
def test_chords(text: str, layout: str, expected: str) -> None:
    assert chord(text, layout) == tuple(expected.split())


@pytest.mark.parametrize(
    ("text", "layout", "pattern"),
    [
        ("", "us", "joined with '\\+'"),
        (None, "us", "joined with '\\+'"),
        (["ctrl", "c"], "us", "joined with '\\+'"),
        ("ctrl+", "us", "without a key next to it"),
        ("+c", "us", "without a key next to it"),
        ("++", "us", "without a key next to it"),
        ("ctrl++c", "us", "without a key next to it"),
        ("ctrl+ctrl+c", "us", "'ctrl' twice"),
        ("a+A", "us", "'A' twice"),
        ("ctrl+Control_L", "us", "'Control_L' twice"),
        ("ctrl+^", "de", "dead key.*'Backquote'"),
        ("ctrl+grave", "de", "dead key"),
        ("ctrl+ö", "us", r"cannot type 'ö'.*\(.*\bde\b"),
        ("ctrl+漢", "us", "no known layout types it"),
        ("ctrl+\ud800", "us", "half of a surrogate pair"),
        ("ctrl+entre", "us", "did you mean 'Enter'"),
        ("ctrl-c", "us", "Join keys .* with '\\+'"),
        ("F13", "us", "keyboard does not have it"),
        ("a" * 100_000, "us", "not a known key"),
    ],
)
def test_wrong_chords(text: str, layout: str, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        chord(text, layout)
    assert len(str(caught.value)) < 900
    str(caught.value).encode()


@given(st.lists(st.sampled_from(["ctrl", "+", "a", "A", " ", "ß", "Enter", "", "\n"])).map("".join))
def test_any_chord_is_pressed_or_a_config_error(text: str) -> None:
    for layout in ("us", "de"):
        try:
            pressed = chord(text, layout)
        except ConfigError:
            continue
        assert pressed
        assert len(set(pressed)) == len(pressed)
        assert set(pressed) <= set(EVDEV)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_character_of_one_stroke_is_a_chord(layout: str) -> None:
    for char in string.ascii_letters + string.digits + string.punctuation:
        ways = strokes(char, layout)
        if len(ways) == 1:
            assert (chord(char, layout),) == tuple(ways)
            assert chord(f"ctrl+{char.lower()}", layout)[-1] == strokes(char.lower(), layout)[0][-1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_dom_and_qemu_call_a_key_is_a_place(layout: str) -> None:
    for name, qcode in {"BracketLeft": "bracket_left", "Minus": "minus", "Comma": "comma"}.items():
        assert chord(name, layout) == (qcode,)
    assert chord("bracket_left", layout) == ("bracket_left",)
    assert chord("IntlBackslash", layout) == ("less",)
    assert chord("minus", layout) == chord("-", layout)  # X's name of a character
