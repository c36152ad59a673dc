"""Which keys type a text or make a chord, by the guest's keyboard layout.

A keyboard sends keys; the guest's own layout makes characters of them. So the layout named here
must be the one that is set in the guest, and Caps Lock must be off there. Num Lock does not
matter: the numeric pad is not used.

The layouts are xkeyboard-config's (`tests/layouts/generate.py` derives layouts.json from it), so
a Linux guest with the layout of that name types exactly this. Windows has most of it in common:
letters, digits, what Shift types, and the dead keys of a layout's own languages; where Linux has
two ways to an ASCII character, the file has the one that is printed on Windows keyboards (nothing
was tried in Windows, though). What is known to differ:

- Behind AltGr, xkeyboard-config has characters (arrows, fractions, ł, ð...) where Windows has none
  or others; and some that Windows has as dead keys, such as ~ and ` on `fr`, or ~ on `es`: Windows
  then waits for the next character, and composes the two if it can.
- Dead keys compose more in Linux (ć on `de`). Acute and diaeresis with a space are ' and " in
  Linux, and the accents themselves in Windows; here these take the dead key twice, which
  Windows answers with two of them.
- `nl` is another layout in Windows, where the Dutch mostly use `us-intl`.

Every layout here types all printable ASCII; `strokes` says of any other character what is lacking.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import json
import re
import string
import unicodedata
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from smolvm_async.config.checks import shown
from smolvm_async.controls.desktop.keys import KEYS, find_key, simplified
from smolvm_async.errors import ConfigError

Stroke = tuple[str, ...]
"""Keys pressed together, as QEMU's qcodes, in the order of pressing: the last one types."""

LAYOUTS = (
    *("us", "us-intl", "us-dvorak", "gb", "ie", "de", "at", "ch", "ch-fr", "fr", "be", "ca"),
    *("nl", "es", "latam", "it", "pt", "br", "dk", "no", "se", "fi", "is", "pl", "cz", "sk"),
    *("hu", "ro", "hr", "si", "ee", "tr"),
)

NONE = "\N{REPLACEMENT CHARACTER}"  # in layouts.json: this key's character is typed otherwise

# Names that X (and so xdotool) has for characters, by the character: `ctrl+plus`.
_NAMES = """
    exclam quotedbl numbersign dollar percent ampersand apostrophe parenleft parenright asterisk
    plus comma minus period slash colon semicolon less equal greater question at bracketleft
    backslash bracketright asciicircum underscore grave braceleft bar braceright asciitilde
"""
CHARACTERS = dict(zip(_NAMES.split(), string.punctuation, strict=True))
CHARACTERS |= {"hyphen": "-", "dot": ".", "equals": "=", "backtick": "`"}  # people's own

# What the DOM and QEMU write otherwise than X is a place: `BracketLeft`, `bracket_left`.
PLACES = frozenset(
    name for key in KEYS for name in (key.qcode, *key.names) if name != name.lower() or "_" in name
)

# With one of these, a letter is the key that it is printed on, as in menus: Ctrl+C has no Shift.
COMMANDING = frozenset({"ctrl", "ctrl_r", "alt", "meta_l", "meta_r"})

_PART = re.compile(r" *(\+|[^+]+) *(\+|$)")


def strokes(text: str, layout: str) -> list[Stroke]:
    r"""The strokes that type a text: one for most characters, two where a dead key is needed.

    A line break (`\n`, `\r\n` or `\r`) is Enter, `\t` is Tab. The text is NFC-normalized first.

    Raises:
        ConfigError: If the layout is unknown, or cannot type a character of the text.
    """
    table = _table(check_layout(layout))
    if not isinstance(text, str):
        raise ConfigError(f"text={shown(text)} is wrong: pass a str.")
    plain = _plain(text)
    try:
        return list(chain.from_iterable(map(table.__getitem__, plain)))
    except KeyError as error:
        char: str = error.args[0]
    index = plain.index(char)
    position = bisect.bisect_right(range(len(text)), index, key=lambda end: len(_plain(text[:end])))
    raise ConfigError(
        f"the layout {layout!r} cannot type {_described(char)}, at position {position - 1} of the "
        f"text: leave it out, or {_alternative(char)}"
    )


def chord(text: str, layout: str) -> Stroke:
    """The keys to press together, as `ctrl+alt+delete` or `Control+Shift+KeyT` names them.

    The parts between the `+` are names of keys (see `find_key`) or characters, which may also be
    called as in X (`plus`, `bracketleft`). A name means a place on the keyboard, a character the
    key that types it on this layout, with Shift or AltGr if need be: `A` is Shift and the key of
    `a`. With Ctrl, Alt or Win, a capital letter is its key alone: `Ctrl+C` is not `Ctrl+Shift+C`.

    Raises:
        ConfigError: If the layout or a key is unknown, a part is missing or there twice, or a
            character cannot be typed with one stroke.
    """
    known = check_layout(layout)
    parts = _parts(text)
    keys = [_name(part) for part in parts]
    commanding = not COMMANDING.isdisjoint(key for stroke in keys for key in stroke)
    found: list[str] = []
    pressed: set[str] = set()
    for part, named in zip(parts, keys, strict=True):
        stroke = named or _character(part, known, text, commanding)
        if stroke[-1] in pressed:
            raise ConfigError(
                f"keys={shown(text)} has the key {part!r} twice: name each key once, "
                "or press them one after the other."
            )
        pressed.add(stroke[-1])
        found += [key for key in stroke if key not in found]
    return tuple(found)


def _parts(text: str) -> list[str]:
    if not isinstance(text, str) or not text:
        raise ConfigError(
            f"keys={shown(text)} is wrong: pass keys joined with '+', such as 'ctrl+alt+delete'."
        )
    parts: list[str] = []
    normal = unicodedata.normalize("NFC", text)
    position, more = 0, "+"
    while more and (match := _PART.match(normal, position)):
        parts.append(match[1].strip(" ") or " ")
        position, more = match.end(), match[2]
    if more:  # a + was the last that was understood
        raise ConfigError(
            f"keys={shown(text)} lacks a key beside a '+': name one on either side, such as "
            "'ctrl+c'; the key + itself is 'plus', or '+' as in 'ctrl++'."
        )
    return parts


def _name(part: str) -> Stroke:
    """The key that a part names; empty if it is a character, or X's name of one."""
    if len(part) == 1 or (simplified(part) in CHARACTERS and part not in PLACES):
        return ()
    return (find_key(part).qcode,)


def _character(part: str, layout: str, text: str, commanding: bool) -> Stroke:
    char = CHARACTERS.get(simplified(part), part) if len(part) > 1 else part
    if commanding and len(char.lower()) == 1:
        char = char.lower()
    ways = _table(layout).get(char)
    if not ways:
        raise ConfigError(
            f"keys={shown(text)}: the layout {layout!r} cannot type {_described(char)}: "
            f"name a key, such as 'KeyA' or 'F5', or {_alternative(char)}"
        )
    if len(ways) > 1:
        raise ConfigError(
            f"keys={shown(text)}: on the layout {layout!r}, {_described(char)} takes a dead key "
            "and another one, which cannot be pressed together: name the key by its place on a US "
            "keyboard, such as 'Backquote', or type the character as text."
        )
    return ways[0]


def check_layout(layout: str) -> str:
    """The layout, if there is one of that name.

    Raises:
        ConfigError: If there is none.
    """
    if isinstance(layout, str) and layout in LAYOUTS:
        return layout
    near = difflib.get_close_matches(str(layout).lower()[:20], LAYOUTS) if layout else []
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ConfigError(
        f"layout={shown(layout)} is not known: {hint}There are: {', '.join(LAYOUTS)}."
    )


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n")


def _described(char: str) -> str:
    if "\ud800" <= char <= "\udfff":
        return f"{char!r} (half of a surrogate pair, no character)"
    return f"{char!r} ({unicodedata.name(char, '') or 'a control or unnamed character'})"


def _alternative(char: str) -> str:
    able = [name for name in LAYOUTS if char in _table(name)]
    if not able:
        return "bring it into the guest another way: no layout here types it."
    return f"set the guest to a layout that has it and name that one ({', '.join(able)})."


# The data


@functools.cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        Path(__file__).with_name("layouts.json").read_text(encoding="utf-8")
    )
    return found


@functools.cache
def _table(layout: str) -> Mapping[str, tuple[Stroke, ...]]:
    """Each character that a layout types, with its strokes."""
    qcodes = _data()["keys"].split()
    lines = dict(_data()["layouts"][layout])
    dead = lines.pop("dead")
    table: dict[str, tuple[Stroke, ...]] = {"\n": (("ret",),), "\r": (("ret",),), "\t": (("tab",),)}
    for modifiers, line in lines.items():
        held = modifiers.split("+") if modifiers else []
        for qcode, char in zip(qcodes, line, strict=False):  # a line ends with its last character
            if char != NONE:
                table[char] = ((*held, qcode),)
    single = {char: ways[0] for char, ways in table.items()}
    for first, made in dead.items():
        accent = tuple(first.split("+"))
        others = dict(made)
        for base, char in zip(others.pop("after"), others.pop("makes"), strict=True):
            table[char] = (accent, single[base])
        for second, char in others.items():
            table[char] = (accent, tuple(second.split("+")))
    return table
