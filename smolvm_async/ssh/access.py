"""Stub."""

from typing import NamedTuple


class Access(NamedTuple):
    port: int
    user: str
    private_key: str
    host_key: str
