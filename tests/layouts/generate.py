"""Writes smolvm_async/controls/desktop/layouts.json: `python -m tests.layouts.generate`.

Every key is pressed with every set of modifiers, and after every dead key, on the keyboards that
libxkbcommon makes of xkeyboard-config. Of several ways to a character, this one is kept:

- the fewest strokes, and a dead key with the space bar before two dead keys;
- without AltGr, since xkeyboard-config and Windows agree far more there than behind it;
- without the keys that not every keyboard has: `less` (no US key) and `ro` (Brazil's);
- the fewest modifiers; then the first in the order of `keys`.

The numeric pad, Num Lock and Caps Lock are never used. A dead key's way is kept if it takes two
strokes: the dead key, and one that types a character (the space bar for the accent itself) or is
dead as well.

The file has, for each layout, a line of characters for each set of modifiers, in the order of
`keys` (`NONE` where a key types nothing, or what is better typed otherwise), and for each dead
key the characters that it makes of others.
"""

from __future__ import annotations

import json
import unicodedata
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import smolvm_async
from smolvm_async.controls.desktop.keys import KEYS
from smolvm_async.controls.desktop.layouts import NONE
from tests.layouts.xkb import Keyboard, sources

TARGET = Path(smolvm_async.__file__).parent / "controls" / "desktop" / "layouts.json"

# Name → layout and variant of xkeyboard-config.
LAYOUTS = {
    "us": ("us", ""),
    "us-intl": ("us", "intl"),
    "us-dvorak": ("us", "dvorak"),
    "gb": ("gb", ""),
    "ie": ("ie", ""),
    "de": ("de", ""),
    "at": ("at", ""),
    "ch": ("ch", ""),
    "ch-fr": ("ch", "fr"),
    "fr": ("fr", ""),
    "be": ("be", ""),
    "ca": ("ca", ""),
    "nl": ("nl", ""),
    "es": ("es", ""),
    "latam": ("latam", ""),
    "it": ("it", ""),
    "pt": ("pt", ""),
    "br": ("br", ""),
    "dk": ("dk", ""),
    "no": ("no", ""),
    "se": ("se", ""),
    "fi": ("fi", ""),
    "is": ("is", ""),
    "pl": ("pl", ""),
    "cz": ("cz", ""),
    "sk": ("sk", ""),
    "hu": ("hu", ""),
    "ro": ("ro", ""),
    "hr": ("hr", ""),
    "si": ("si", ""),
    "ee": ("ee", ""),
    "tr": ("tr", ""),
}

# All that these can type without AltGr is typed so, with two strokes if need be: Windows has the
# same dead keys on them, but behind AltGr another character, or none, where xkeyboard-config has ~.
WITHOUT_ALTGR = frozenset({"us-intl", "br"})

# Where xkeyboard-config has a character twice behind AltGr, Windows has it on one of these keys.
WINDOWS = {
    **dict.fromkeys(("ch", "ch-fr"), ("2", "7", "bracket_right", "backslash")),
    "fr": ("0", "6"),
    "be": ("2", "9", "bracket_left", "less"),
    "es": ("1", "2", "apostrophe", "bracket_left", "bracket_right", "backslash", "grave_accent"),
    "latam": ("q", "bracket_right", "minus"),
    "it": ("semicolon", "bracket_left", "bracket_right"),
    **dict.fromkeys(("pt", "dk", "no", "se"), ("2",)),
    **dict.fromkeys(("fi", "is"), ("less",)),
    **dict.fromkeys(("cz", "sk"), (*"vxcbnfg", "semicolon", "slash", "comma", "dot")),
    "ee": ("2", "4", "less"),
}

MODIFIERS = ("", "shift", "alt_r", "shift+alt_r")
QCODES = (
    *"1234567890qwertyuiopasdfghjklzxcvbnm",
    *("minus", "equal", "bracket_left", "bracket_right", "semicolon", "apostrophe"),
    *("grave_accent", "backslash", "comma", "dot", "slash", "spc", "less", "ro"),
)
EVDEV = {key.qcode: key.evdev for key in KEYS}


class Way(NamedTuple):
    """A stroke. The lesser of two is better, and no two are equal."""

    altgr: bool
    strange: bool  # to Windows
    uncommon: bool  # not on every keyboard
    modifiers: int  # in MODIFIERS
    key: int  # in QCODES

    def __str__(self) -> str:
        return f"{MODIFIERS[self.modifiers]}+{QCODES[self.key]}".lstrip("+")

    def evdev(self) -> list[int]:
        """Its keys, as Linux numbers them."""
        return [EVDEV[qcode] for qcode in str(self).split("+")]


def ways_of(name: str) -> list[Way]:
    """Every stroke, the best one first."""
    ways: list[Way] = []
    for modifiers, held in enumerate(MODIFIERS):
        for key, qcode in enumerate(QCODES):
            altgr = "alt_r" in held
            strange = altgr and qcode not in WINDOWS.get(name, QCODES)
            ways.append(Way(altgr, strange, qcode in ("less", "ro"), modifiers, key))
    return sorted(ways)


def characters(name: str) -> dict[str, tuple[Way, ...]]:
    """Each character of a layout, with the best way to it."""
    keyboard = Keyboard(*LAYOUTS[name])
    single: dict[str, Way] = {}
    dead: dict[int, Way] = {}
    for way in ways_of(name):
        keyboard.reset()
        *held, key = way.evdev()
        for modifier in held:
            keyboard.down(modifier)
        keysym = keyboard.keysym(key)
        typed = keyboard.down(key)
        if keyboard.waits():
            dead.setdefault(keysym, way)
        elif typable(typed):
            single.setdefault(typed, way)

    def rank(ways: tuple[Way, ...]) -> tuple[object, ...]:
        altgr = any(way.altgr for way in ways)
        uncommon = any(way.uncommon for way in ways)
        modifiers = sum(str(way).count("+") for way in ways)
        twice_dead = len(ways) > 1 and ways[1] in dead.values()  # Windows types both accents
        avoided = altgr and name in WITHOUT_ALTGR
        return avoided, len(ways), twice_dead, altgr, uncommon, modifiers, ways

    best: dict[str, tuple[Way, ...]] = {char: (way,) for char, way in single.items()}
    for first, second in product(dead.values(), (*single.values(), *dead.values())):
        keyboard.reset()
        keyboard.stroke(first.evdev())
        typed = keyboard.stroke(second.evdev())
        ways = (first, second)
        if typable(typed) and (typed not in best or rank(ways) < rank(best[typed])):
            best[typed] = ways
    return best


def typable(typed: str) -> bool:
    """Return whether a text can be typed: one character, no control or mark, unchanged by NFC."""
    return (
        len(typed) == 1
        and unicodedata.category(typed)[0] not in "CM"
        and unicodedata.is_normalized("NFC", typed)
    )


def compact(best: dict[str, tuple[Way, ...]]) -> dict[str, Any]:
    """Return a layout as the file has it."""
    found: dict[str, Any] = {}
    singles = {ways[0]: char for char, ways in best.items() if len(ways) == 1}
    for index, modifiers in enumerate(MODIFIERS):
        line = [NONE] * len(QCODES)
        for way, char in singles.items():
            if way.modifiers == index:
                line[way.key] = char
        if text := "".join(line).rstrip(NONE):
            found[modifiers] = text
    after: dict[str, dict[str, str]] = {}
    for char, ways in sorted(best.items()):
        if len(ways) == 2:
            base = singles.get(ways[1], str(ways[1]))
            after.setdefault(str(ways[0]), {})[base] = char
    found["dead"] = {}
    for dead, made in sorted(after.items()):
        found["dead"][dead] = {
            "after": "".join(base for base in made if len(base) == 1),
            "makes": "".join(char for base, char in made.items() if len(base) == 1),
            **{base: char for base, char in made.items() if len(base) > 1},
        }
    return found


def generated() -> str:
    """The file, made anew."""
    layouts = {name: compact(characters(name)) for name in LAYOUTS}
    made = {"sources": sources(), "keys": " ".join(QCODES), "layouts": layouts}
    return json.dumps(made, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(generated())
