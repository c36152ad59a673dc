"""Stub."""


class Shell:
    pass
