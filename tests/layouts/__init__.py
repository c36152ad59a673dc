"""Layouts from xkeyboard-config: what makes layouts.json, and a keyboard to try it on."""
