"""How to log in to a guest."""

from __future__ import annotations

from typing import NamedTuple


class Access(NamedTuple):
    """Where a guest's SSH server is, and the keys that both sides know each other by.

    Attributes:
        port: On 127.0.0.1.
        user: As whom.
        private_key: Ours, in OpenSSH's format.
        host_key: The server's, as a line of `authorized_keys`; any other is refused.
    """

    port: int
    user: str
    private_key: str
    host_key: str
