"""The names of keys: what people, the DOM, X and QEMU call them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolvm_async.controls.desktop.keys import KEYS, Key, find_key, simplified
from smolvm_async.errors import ConfigError
from tests.layouts.xkb import Keyboard, missing


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.qcode)
def test_every_name_finds_its_key(key: Key) -> None:
    for name in (key.qcode, *key.names):
        if len(name) > 1:
            for spelling in (name, name.upper(), name.lower(), name.replace("_", " ")):
                assert find_key(spelling) is key


def test_no_name_means_two_keys() -> None:
    owners: dict[str, str] = {}
    for key in KEYS:
        for name in (key.qcode, *key.names):
            assert owners.setdefault(simplified(name), key.qcode) == key.qcode, name
            assert name.isascii()
    assert len({key.qcode for key in KEYS}) == len(KEYS)
    assert len({key.evdev for key in KEYS}) == len(KEYS)


@pytest.mark.parametrize(
    ("names", "qcode"),
    [
        ("Enter Return ret", "ret"),
        ("Escape esc ESC", "esc"),
        ("Control ControlLeft Control_L ctrl CTRL", "ctrl"),
        ("Meta MetaLeft Super_L win super meta cmd", "meta_l"),
        ("altgr AltGraph ISO_Level3_Shift Alt_R AltRight", "alt_r"),
        ("ContextMenu Menu apps", "compose"),
        ("PageDown Page_Down Next pgdn page_down", "pgdn"),
        ("PageUp Page_Up Prior pgup", "pgup"),
        ("ArrowLeft Left left", "left"),
        ("Delete del", "delete"),
        ("Insert ins", "insert"),
        ("Backspace BackSpace", "backspace"),
        ("Space space spc", "spc"),
        ("CapsLock Caps_Lock caps_lock", "caps_lock"),
        ("PrintScreen Print print_screen Sys_Req", "print"),
        ("NumpadEnter KP_Enter kp_enter", "kp_enter"),
        ("Numpad0 KP_0", "kp_0"),
        ("KeyA", "a"),
        ("Digit1", "1"),
        ("IntlBackslash less", "less"),
        ("AudioVolumeUp XF86AudioRaiseVolume volume_up", "volumeup"),
    ],
)
def test_the_names_that_people_know(names: str, qcode: str) -> None:
    assert {find_key(name).qcode for name in names.split()} == {qcode}


def test_the_whole_pc_keyboard_is_there() -> None:
    main = [*range(1, 84), 86, 87, 88, 96, 97, 98, 99, 100, *range(102, 112), 119, 125, 126, 127]
    assert len(main) == 105
    assert set(main) <= {key.evdev for key in KEYS}


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_the_keysyms_of_x_are_on_these_keys() -> None:
    keyboards = [Keyboard(layout) for layout in ("us", "de", "jp")]
    # X has Meta on Alt with Shift; the DOM has Clear on the numeric pad's 5.
    elsewhere = {"Meta_L", "Meta_R", "Clear", "multiply"}
    seen = 0
    for key in KEYS:
        for name in key.names:
            keysym = keyboards[0].named(name)
            if keysym and len(name) > 1 and name not in elsewhere:
                seen += 1
                assert any(keysym in each.keysyms(key.evdev) for each in keyboards), name
    assert seen > 80


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("", "pass the name of a key"),
        ("Entre", "did you mean 'Enter'"),
        ("pgdwn", "'pgdn'"),
        ("windoes", "'Windows'"),
        ("ctrl-c", r"Join keys .* with '\+'"),
        ("F13", "QEMU's PS/2 keyboard does not have it"),
        ("hangul", "QEMU's PS/2 keyboard does not have it"),
        ("a", "is a character.*'KeyA'"),
        ("§", "is a character"),
        ("qqqqqq", "'ArrowLeft'"),
        ("x" * 100_000, "not a known key"),
        ("\ud800\ud800", "not a known key"),
    ],
)
def test_a_wrong_name_says_what_to_do(name: str, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        find_key(name)
    assert len(str(caught.value)) < 600
    str(caught.value).encode()


@pytest.mark.parametrize("name", [None, 13, b"Enter", ["Enter"]])
def test_a_name_is_a_str(name: object) -> None:
    with pytest.raises(ConfigError, match="pass the name of a key"):
        find_key(name)  # type: ignore[arg-type]


@given(st.text())
def test_any_text_is_a_key_or_a_config_error(name: str) -> None:
    try:
        assert find_key(name) in KEYS
    except ConfigError as error:
        str(error).encode()
