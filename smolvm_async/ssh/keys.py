"""Stub."""

from typing import NamedTuple


class KeyPair(NamedTuple):
    private: bytes
    public: str


def make_key_pair() -> KeyPair:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    return _p(key)


def _p(key):
    from cryptography.hazmat.primitives import serialization as s

    return KeyPair(
        key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()),
        key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH).decode(),
    )


def load_key_pair(private):
    from cryptography.hazmat.primitives import serialization as s

    return _p(s.load_ssh_private_key(private, None))
