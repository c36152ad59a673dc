"""A keyboard that xkeyboard-config lays out: libxkbcommon, by ctypes.

What this user or this host configured (~/.config/xkb, ~/.XCompose, the locale) is left out: the
data is the distribution's own. Dead keys compose by libX11's table for en_US.UTF-8, which nearly
every locale and GTK share.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from ctypes import POINTER, Structure, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from pathlib import Path

DATA = Path("/usr/share/X11/xkb")
VERSION = Path("/usr/share/pkgconfig/xkeyboard-config.pc")
COMPOSE = Path("/usr/share/X11/locale/en_US.UTF-8/Compose")
PACKAGES = "libxkbcommon0, xkb-data and libx11-data"  # Debian's, that hold them

NO_DEFAULT_INCLUDES, NO_ENVIRONMENT = 1, 2
UP, DOWN = 0, 1
NOTHING, COMPOSING, COMPOSED, CANCELLED = range(4)
FIRST_DEAD, LAST_DEAD = 0xFE50, 0xFE93  # keysyms dead_grave to dead_longsolidusoverlay


class _Names(Structure):
    _fields_ = [(name, c_char_p) for name in ("rules", "model", "layout", "variant", "options")]


_FUNCTIONS = {
    "xkb_context_new": (c_void_p, [c_int]),
    "xkb_context_include_path_append": (c_int, [c_void_p, c_char_p]),
    "xkb_keymap_new_from_names": (c_void_p, [c_void_p, POINTER(_Names), c_int]),
    "xkb_keymap_num_levels_for_key": (c_uint32, [c_void_p, c_uint32, c_uint32]),
    "xkb_keymap_key_get_syms_by_level": (
        c_int,
        [c_void_p, c_uint32, c_uint32, c_uint32, POINTER(POINTER(c_uint32))],
    ),
    "xkb_state_new": (c_void_p, [c_void_p]),
    "xkb_state_update_key": (c_int, [c_void_p, c_uint32, c_int]),
    "xkb_state_key_get_one_sym": (c_uint32, [c_void_p, c_uint32]),
    "xkb_state_key_get_utf8": (c_int, [c_void_p, c_uint32, c_char_p, c_size_t]),
    "xkb_state_unref": (None, [c_void_p]),
    "xkb_compose_table_new_from_buffer": (
        c_void_p,
        [c_void_p, c_char_p, c_size_t, c_char_p, c_int, c_int],
    ),
    "xkb_compose_state_new": (c_void_p, [c_void_p, c_int]),
    "xkb_compose_state_feed": (c_int, [c_void_p, c_uint32]),
    "xkb_compose_state_reset": (None, [c_void_p]),
    "xkb_compose_state_get_status": (c_int, [c_void_p]),
    "xkb_compose_state_get_utf8": (c_int, [c_void_p, c_char_p, c_size_t]),
    "xkb_keysym_from_name": (c_uint32, [c_char_p, c_int]),
}


def missing() -> str:
    """Why there can be no keyboard on this host; empty if there can."""
    absent = [str(path) for path in (DATA, VERSION, COMPOSE) if not path.exists()]
    try:
        ctypes.CDLL("libxkbcommon.so.0")
    except OSError:
        absent.append("libxkbcommon.so.0")
    return f"no {', '.join(absent)}: install {PACKAGES}" if absent else ""


def sources() -> dict[str, str]:
    """Return the version of xkeyboard-config and the digest of the compose table."""
    version = re.search(r"^Version: (\S+)", VERSION.read_text(), re.M)
    assert version
    digest = hashlib.sha256(COMPOSE.read_bytes()).hexdigest()
    return {"xkeyboard-config": version[1], "compose": digest[:16]}


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libxkbcommon.so.0")
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Keyboard:
    """A keyboard of one layout, and the program that reads what is typed on it.

    The keymaps are never freed: there are few, and the process is short-lived.
    """

    def __init__(self, layout: str, variant: str = "") -> None:
        self._library = _library()
        context = self._library.xkb_context_new(NO_DEFAULT_INCLUDES | NO_ENVIRONMENT)
        assert self._library.xkb_context_include_path_append(context, bytes(DATA))
        names = _Names(b"evdev", b"pc105", layout.encode(), variant.encode(), b"")
        self._keymap = self._library.xkb_keymap_new_from_names(context, ctypes.byref(names), 0)
        assert self._keymap, f"xkeyboard-config has no layout {layout}({variant})"
        text = COMPOSE.read_bytes()
        table = self._library.xkb_compose_table_new_from_buffer(
            *(context, text, len(text), b"en_US.UTF-8", 1, 0)
        )
        assert table
        self._compose = self._library.xkb_compose_state_new(table, 0)
        self._state = self._library.xkb_state_new(self._keymap)

    def reset(self) -> None:
        """No key is down, no lock is on, no dead key waits."""
        self._library.xkb_state_unref(self._state)
        self._state = self._library.xkb_state_new(self._keymap)
        self._library.xkb_compose_state_reset(self._compose)

    def keysym(self, evdev: int) -> int:
        """Return the keysym of a key with the modifiers that are down."""
        found = self._library.xkb_state_key_get_one_sym(self._state, evdev + 8)
        assert isinstance(found, int)
        return found

    def down(self, evdev: int) -> str:
        """Press a key, and return what it types."""
        keysym = self.keysym(evdev)
        heard = self._library.xkb_compose_state_feed(self._compose, keysym)  # not a modifier
        status = self._library.xkb_compose_state_get_status(self._compose)
        buffer = ctypes.create_string_buffer(64)
        if not heard or status == NOTHING:
            self._library.xkb_state_key_get_utf8(self._state, evdev + 8, buffer, 64)
        elif status == COMPOSED:
            self._library.xkb_compose_state_get_utf8(self._compose, buffer, 64)
        self._library.xkb_state_update_key(self._state, evdev + 8, DOWN)
        return buffer.value.decode()

    def up(self, evdev: int) -> None:
        """Let a key go."""
        self._library.xkb_state_update_key(self._state, evdev + 8, UP)

    def stroke(self, evdev: list[int]) -> str:
        """Press keys one after the other, let them go in reverse; return what they type."""
        typed = "".join([self.down(key) for key in evdev])
        for key in reversed(evdev):
            self.up(key)
        return typed

    def waits(self) -> bool:
        """Return whether a dead key was typed and waits for the next key."""
        status = self._library.xkb_compose_state_get_status(self._compose)
        return bool(status == COMPOSING)

    def keysyms(self, evdev: int) -> set[int]:
        """Return all keysyms that a key can have, with any modifiers and locks."""
        found: set[int] = set()
        for level in range(self._library.xkb_keymap_num_levels_for_key(self._keymap, evdev + 8, 0)):
            array = POINTER(c_uint32)()
            count = self._library.xkb_keymap_key_get_syms_by_level(
                *(self._keymap, evdev + 8, 0, level, ctypes.byref(array))
            )
            found.update(array[index] for index in range(count))
        return found

    def named(self, name: str) -> int:
        """The keysym with this name, as it is spelled; 0 if none."""
        found = self._library.xkb_keysym_from_name(name.encode(), 0)
        assert isinstance(found, int)
        return found


def is_dead(keysym: int) -> bool:
    """Return whether a keysym is that of a dead key."""
    return FIRST_DEAD <= keysym <= LAST_DEAD
