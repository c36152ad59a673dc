"""The keys for a text or a chord, by the guest's keyboard layout.

A keyboard sends keys; the guest's layout turns them into characters. So the layout passed here must
be the layout that is set in the guest, and Caps Lock must be off in the guest. Num Lock does not
matter: the numeric pad is not used.

The layouts are xkeyboard-config's (`tests/layouts/generate.py` derives layouts.json from it), so a
Linux guest with the layout of the same name types exactly this text. Windows mostly agrees: on
letters, digits, characters with Shift, and the dead keys of a layout's own languages. If Linux can
type an ASCII character in two ways, layouts.json has the way that is printed on Windows keyboards.
(We have not tested this in Windows.) The known differences:

- With AltGr, xkeyboard-config has characters (arrows, fractions, ł, ð...) where Windows has other
  characters or none. Some are dead keys in Windows, such as ~ and ` on `fr`, or ~ on `es`: Windows
  then waits for the next character, and composes the two characters if it can.
- Dead keys compose more characters in Linux (ć on `de`). The dead keys acute and diaeresis before a
  space type ' and " in Linux, but the accents themselves in Windows. Here, to type an accent means
  to press its dead key twice, which types two accents in Windows.
- `nl` is a different layout in Windows, where the Dutch mostly use `us-intl`.

Every layout here types all printable ASCII. For a character that the layout lacks, `strokes()`
raises an error that lists the layouts with this character.
"""

from __future__ import annotations

import bisect
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
"""Keys pressed together, as QEMU's qcodes, in the order of pressing; the last key types."""

LAYOUTS = (
    *("us", "us-intl", "us-dvorak", "gb", "ie", "de", "at", "ch", "ch-fr", "fr", "be", "ca"),
    *("nl", "es", "latam", "it", "pt", "br", "dk", "no", "se", "fi", "is", "pl", "cz", "sk"),
    *("hu", "ro", "hr", "si", "ee", "tr"),
)

NONE = "\N{REPLACEMENT CHARACTER}"  # in layouts.json: the key's character is typed in another way

# X's (and xdotool's) names of characters, as in `ctrl+plus`.
_NAMES = """
    exclam quotedbl numbersign dollar percent ampersand apostrophe parenleft parenright asterisk
    plus comma minus period slash colon semicolon less equal greater question at bracketleft
    backslash bracketright asciicircum underscore grave braceleft bar braceright asciitilde
"""
CHARACTERS = dict(zip(_NAMES.split(), string.punctuation, strict=True))
CHARACTERS |= {"hyphen": "-", "dot": ".", "equals": "=", "backtick": "`"}  # common names

# If the DOM or QEMU spells a name unlike X, the name is a position: `BracketLeft`, `bracket_left`.
PLACES = frozenset(
    name for key in KEYS for name in (key.qcode, *key.names) if name != name.lower() or "_" in name
)

# With one of these keys, a capital letter means its key without Shift, as in menus: Ctrl+C.
COMMANDING = frozenset({"ctrl", "ctrl_r", "alt", "meta_l", "meta_r"})

_PART = r" *(\+|[^+]+) *(\+|$)"


def strokes(text: str, layout: str) -> list[Stroke]:
    r"""Return the strokes that type a text: one for most characters, two if a dead key is needed.

    A line break (`\n`, `\r\n` or `\r`) is Enter, `\t` is Tab. The text is NFC-normalized first.

    Raises:
        ConfigError: The layout is unknown, or cannot type a character of the text.
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
        f"text: leave the character out, or {_alternative(char)}"
    )


def chord(text: str, layout: str) -> Stroke:
    """Return the keys to press together for `ctrl+alt+delete` or `Control+Shift+KeyT`.

    The parts between the `+` are names of keys (see `find_key()`) or characters; X's names of
    characters work, too (`plus`, `bracketleft`). A key's name means a position on the keyboard. A
    character means the key that types it on this layout, with Shift or AltGr if necessary: `A` is
    Shift and the key of `a`. With Ctrl, Alt or Win, a capital letter means its key without Shift:
    `Ctrl+C` is not `Ctrl+Shift+C`.

    Raises:
        ConfigError: The layout or a key is unknown, a part is missing or occurs twice, or a
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
    part, position, more = re.compile(_PART), 0, "+"
    while more and (match := part.match(normal, position)):
        parts.append(match[1].strip(" ") or " ")
        position, more = match.end(), match[2]
    if more:  # the last match ended with a +
        raise ConfigError(
            f"keys={shown(text)} has a '+' without a key next to it: name a key on both sides "
            "of each '+', such as 'ctrl+c'. The key + itself is 'plus', or '+' as in 'ctrl++'."
        )
    return parts


def _name(part: str) -> Stroke:
    """Return the key that a part names; empty for a character, or for X's name of a character."""
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
            f"keys={shown(text)}: on the layout {layout!r}, {_described(char)} needs a dead key "
            "and then another key, which cannot be pressed together: name the key by its position "
            "on a US keyboard, such as 'Backquote', or type the character as text."
        )
    return ways[0]


def check_layout(layout: str) -> str:
    """Check the name of a layout and return it."""
    if isinstance(layout, str) and layout in LAYOUTS:
        return layout
    import difflib  # only for a hint

    text = layout.lower()[:20] if isinstance(layout, str) else ""
    near = difflib.get_close_matches(text, LAYOUTS) if text else []
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ConfigError(
        f"layout={shown(layout)} is not known: {hint}The layouts are {', '.join(LAYOUTS)}."
    )


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n")


def _described(char: str) -> str:
    if "\ud800" <= char <= "\udfff":
        return f"{char!r} (half of a surrogate pair, not a character)"
    return f"{char!r} ({unicodedata.name(char, '') or 'a control or unnamed character'})"


def _alternative(char: str) -> str:
    able = [name for name in LAYOUTS if char in _table(name)]
    if not able:
        return "bring the character into the guest in another way: no known layout types it."
    return (
        "set the guest to a layout that has the character and pass that layout "
        f"({', '.join(able)})."
    )


# The data of the layouts


@functools.cache
def _data() -> Any:
    return json.loads(Path(__file__).with_name("layouts.json").read_text(encoding="utf-8"))


@functools.cache
def _table(layout: str) -> Mapping[str, tuple[Stroke, ...]]:
    """Return the strokes of each character that a layout types."""
    qcodes = _data()["keys"].split()
    lines = dict(_data()["layouts"][layout])
    dead = lines.pop("dead")
    table: dict[str, tuple[Stroke, ...]] = {"\n": (("ret",),), "\r": (("ret",),), "\t": (("tab",),)}
    for modifiers, line in lines.items():
        held = modifiers.split("+") if modifiers else []
        for qcode, char in zip(qcodes, line, strict=False):  # a line ends after its last character
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
