"""The keys of the guest's keyboard: their QEMU names, Linux numbers and common names.

The keyboard is q35's PS/2 keyboard. Each row was tested: the key was pressed in a Linux guest under
QEMU 7.2, and the guest reported the row's evdev number. A name means a key by its position on a US
keyboard: `KeyQ` is the key right of Tab, whatever character it types. The module `layouts` knows
which keys type a character.

Keys that did not reach the guest are left out, even if QEMU has a name for them: F13 to F24 (QEMU
has the names only since 8.0), the Korean Hangul and Hanja keys (`lang1`, `lang2`; a Korean keyboard
has them in the positions of the right Alt and Ctrl), Katakana and Zenkaku/Hankaku as separate keys,
Help, Undo, Copy and similar keys. QEMU's `menu` is left out for the same reason: the menu key
beside the right Ctrl is QEMU's `compose`. A key with two QEMU names has only one row: `sysrq` is
`print`, and `asterisk` is `kp_multiply`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from smolvm_async.config.checks import shown
from smolvm_async.errors import ConfigError


class Key(NamedTuple):
    """A key of the guest's keyboard.

    Attributes:
        qcode: QEMU's QKeyCode, for `input-send-event`.
        evdev: The number in linux/input-event-codes.h, which a Linux guest reports.
        names: Other names: the DOM's `key` and `code`, X's keysym, common words.
    """

    qcode: str
    evdev: int
    names: tuple[str, ...]


def _key(qcode: str, evdev: int, names: str) -> Key:
    return Key(qcode, evdev, tuple(names.split()))


def _run(first: int, qcodes: str, prefix: str) -> Iterator[Key]:
    """Yield keys with consecutive evdev numbers."""
    for offset, qcode in enumerate(qcodes):
        yield Key(qcode, first + offset, (f"{prefix}{qcode.upper()}",))


KEYS: tuple[Key, ...] = (
    # The main block, row by row.
    _key("esc", 1, "Escape"),
    *(Key(f"f{n}", 58 + n, (f"F{n}",)) for n in range(1, 11)),
    _key("f11", 87, "F11"),
    _key("f12", 88, "F12"),
    _key("grave_accent", 41, "Backquote grave"),
    *_run(2, "1234567890", "Digit"),
    _key("minus", 12, "Minus"),
    _key("equal", 13, "Equal"),
    _key("backspace", 14, "Backspace BackSpace bksp"),
    _key("tab", 15, "Tab"),
    *_run(16, "qwertyuiop", "Key"),
    _key("bracket_left", 26, "BracketLeft bracketleft"),
    _key("bracket_right", 27, "BracketRight bracketright"),
    _key("ret", 28, "Enter Return"),
    _key("caps_lock", 58, "CapsLock Caps_Lock caps"),
    *_run(30, "asdfghjkl", "Key"),
    _key("semicolon", 39, "Semicolon"),
    _key("apostrophe", 40, "Quote apostrophe"),
    _key("backslash", 43, "Backslash IntlHash"),
    _key("shift", 42, "Shift ShiftLeft Shift_L left_shift lshift"),
    _key("less", 86, "IntlBackslash 102nd OEM_102"),  # right of the left Shift; not on US keyboards
    *_run(44, "zxcvbnm", "Key"),
    _key("comma", 51, "Comma"),
    _key("dot", 52, "Period period"),
    _key("slash", 53, "Slash"),
    _key("shift_r", 54, "ShiftRight Shift_R right_shift rshift"),
    _key(
        "ctrl", 29, "Control ControlLeft Control_L ControlOrMeta ctrl_left ctrl_l left_ctrl lctrl"
    ),
    _key(
        *("meta_l", 125),
        "Meta MetaLeft Meta_L Super Super_L super_left left_super OS OSLeft "
        "Win win_l win_left left_win lwin Windows Cmd Command",
    ),
    _key("alt", 56, "Alt AltLeft Alt_L left_alt lalt Option opt"),
    _key("spc", 57, "Space space spacebar"),
    _key("alt_r", 100, "AltGr AltGraph AltRight Alt_R right_alt ralt ISO_Level3_Shift"),
    _key(
        *("meta_r", 126),
        "MetaRight Meta_R Super_R super_right right_super OSRight win_r win_right right_win rwin",
    ),
    _key("compose", 127, "ContextMenu Menu Apps Application"),
    _key("ctrl_r", 97, "ControlRight Control_R ctrl_right right_ctrl rctrl"),
    # Between the main block and the numeric pad.
    _key(
        "print",
        99,
        "PrintScreen Print print_screen prtsc prtscr prt_scn prntscrn snapshot Sys_Req sysrq",
    ),
    _key("scroll_lock", 70, "ScrollLock Scroll_Lock"),
    _key("pause", 119, "Pause Break pause_break"),
    _key("insert", 110, "Insert ins"),
    _key("delete", 111, "Delete del"),
    _key("home", 102, "Home"),
    _key("end", 107, "End"),
    _key("pgup", 104, "PageUp Page_Up Prior"),
    _key("pgdn", 109, "PageDown Page_Down Next pgdown"),
    _key("up", 103, "ArrowUp Up up_arrow"),
    _key("left", 105, "ArrowLeft Left left_arrow"),
    _key("down", 108, "ArrowDown Down down_arrow"),
    _key("right", 106, "ArrowRight Right right_arrow"),
    # The numeric pad. If a key has two KP names, Num Lock decides which of them applies.
    _key("num_lock", 69, "NumLock Num_Lock"),
    _key("kp_divide", 98, "NumpadDivide KP_Divide divide"),
    _key("kp_multiply", 55, "NumpadMultiply KP_Multiply NumpadStar multiply"),
    _key("kp_subtract", 74, "NumpadSubtract KP_Subtract subtract"),
    _key("kp_add", 78, "NumpadAdd KP_Add add"),
    _key("kp_enter", 96, "NumpadEnter KP_Enter"),
    _key("kp_decimal", 83, "NumpadDecimal KP_Decimal KP_Delete decimal"),
    _key("kp_0", 82, "Numpad0 num0 KP_0 KP_Insert"),
    _key("kp_1", 79, "Numpad1 num1 KP_1 KP_End"),
    _key("kp_2", 80, "Numpad2 num2 KP_2 KP_Down"),
    _key("kp_3", 81, "Numpad3 num3 KP_3 KP_Page_Down KP_Next"),
    _key("kp_4", 75, "Numpad4 num4 KP_4 KP_Left"),
    _key("kp_5", 76, "Numpad5 num5 KP_5 KP_Begin Clear"),
    _key("kp_6", 77, "Numpad6 num6 KP_6 KP_Right"),
    _key("kp_7", 71, "Numpad7 num7 KP_7 KP_Home"),
    _key("kp_8", 72, "Numpad8 num8 KP_8 KP_Up"),
    _key("kp_9", 73, "Numpad9 num9 KP_9 KP_Page_Up KP_Prior"),
    _key("kp_equals", 117, "NumpadEqual KP_Equal"),  # on few keyboards
    _key("kp_comma", 121, "NumpadComma"),  # on Brazilian keyboards
    # Japanese and Brazilian keyboards.
    _key("ro", 89, "IntlRo"),  # Brazilian: / and ?
    _key("yen", 124, "IntlYen"),
    _key("muhenkan", 94, "NonConvert Muhenkan"),
    _key("henkan", 92, "Convert Henkan Henkan_Mode"),
    _key("katakanahiragana", 93, "KanaMode Hiragana_Katakana"),
    _key("hiragana", 91, "Hiragana Lang4"),
    # Power, media, browser. Their effect depends on the guest.
    _key("power", 116, "Power PowerOff XF86PowerOff"),
    _key("sleep", 142, "Sleep Standby XF86Sleep"),
    _key("wake", 143, "WakeUp XF86WakeUp"),
    _key("audiomute", 113, "AudioVolumeMute XF86AudioMute volume_mute mute"),
    _key("volumedown", 114, "VolumeDown AudioVolumeDown XF86AudioLowerVolume"),
    _key("volumeup", 115, "VolumeUp AudioVolumeUp XF86AudioRaiseVolume"),
    _key("audioplay", 164, "MediaPlayPause XF86AudioPlay play_pause"),
    _key("audiostop", 166, "MediaStop XF86AudioStop"),
    _key("audionext", 163, "MediaTrackNext XF86AudioNext next_track"),
    _key("audioprev", 165, "MediaTrackPrevious XF86AudioPrev previous_track prev_track"),
    _key("mediaselect", 226, "MediaSelect LaunchMediaPlayer XF86AudioMedia"),
    _key("mail", 155, "LaunchMail XF86Mail"),
    _key("calculator", 140, "LaunchCalculator LaunchApp2 XF86Calculator calc"),
    _key("computer", 157, "LaunchMyComputer LaunchApp1 XF86MyComputer"),
    _key("ac_home", 172, "BrowserHome XF86HomePage"),
    _key("ac_back", 158, "BrowserBack XF86Back"),
    _key("ac_forward", 159, "BrowserForward XF86Forward"),
    _key("ac_refresh", 173, "BrowserRefresh XF86Reload"),
    _key("ac_bookmarks", 156, "BrowserFavorites XF86Favorites"),
    _key("stop", 128, "BrowserStop"),
)

# Keys that only other keyboards have. For their names, `find_key()` has a special error message.
_ABSENT = """
    lang1 lang2 lang3 lang5 hangul hanja hangul_mode hanja_mode hangul_hanja katakana zenkaku
    hankaku zenkaku_hankaku eisu eisu_toggle alphanumeric help undo redo again props front copy open
    paste find cut lf linefeed select execute cancel browser_search xf86_search eject fn fn_lock
    hyper hyper_l hyper_r multi_key numpad_paren_left numpad_paren_right brightness_up
    brightness_down xf86_mon_brightness_up xf86_mon_brightness_down microphone_mute
"""


def simplified(name: str) -> str:
    """Return a name in the form for comparison: without case, `_` and spaces."""
    return name.casefold().replace("_", "").replace(" ", "")


# A single character is not a name: the layout decides which key types the character.
_BY_NAME = {
    simplified(name): key for key in KEYS for name in (key.qcode, *key.names) if len(name) > 1
}
_NOWHERE = {simplified(name) for name in _ABSENT.split()} | {f"f{n}" for n in range(13, 36)}


def find_key(name: str) -> Key:
    """Return the key with this name: QEMU's, the DOM's, X's or a common name.

    Case, `_` and spaces do not matter: `Page_Down`, `page down` and `PAGEDOWN` are the same.

    Raises:
        ConfigError: No key has this name; the message suggests similar names.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"key={shown(name)} is wrong: pass the name of a key, such as 'Enter'.")
    asked = simplified(name)
    if key := _BY_NAME.get(asked):
        return key
    if len(name) == 1:
        raise ConfigError(
            f"key={name!r} is a character, and the layout decides which key types it: pass the "
            "name of a key by its position on a US keyboard, such as 'KeyA' or 'Digit1'."
        )
    if asked in _NOWHERE:
        raise ConfigError(
            f"key={name!r} is not on the guest's keyboard: QEMU's PS/2 keyboard does not have it. "
            "Use a menu of the guest or another combination of keys instead."
        )
    import difflib  # only for a hint

    near = difflib.get_close_matches(asked[:40], _BY_NAME, n=3)
    names = dict.fromkeys(_spelled(word) for word in near)
    advice = f"did you mean {' or '.join(map(repr, names))}?" if names else (
        "use the DOM's names ('Enter', 'ArrowLeft', 'KeyA', 'F5'), "
        "X's ('Return', 'Page_Down') or common ones ('ctrl', 'esc', 'del')."
    )  # fmt: skip
    if "-" in name:
        advice = f"{advice} Join keys that are pressed together with '+'."
    raise ConfigError(f"key={shown(name)} is not a known key: {advice}")


def _spelled(word: str) -> str:
    """Return the spelling in `KEYS` of a simplified name."""
    key = _BY_NAME[word]
    return next(name for name in (*key.names, key.qcode) if simplified(name) == word)
