"""Key pairs for SSH, in OpenSSH's own formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class KeyPair(NamedTuple):
    """An Ed25519 key pair.

    Attributes:
        private: As a file of ssh-keygen holds it, without a passphrase.
        public: As a line of `authorized_keys`.
    """

    private: bytes
    public: str


def make_key_pair() -> KeyPair:
    """Make a new one."""
    # Here, since a Windows guest needs no key and the import takes some 50 ms.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return _pair(Ed25519PrivateKey.generate())


def load_key_pair(private: bytes) -> KeyPair:
    """The pair of which this is the private key.

    Raises:
        ValueError: If it is none.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    key = load_ssh_private_key(private, None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("this is no Ed25519 key")
    return _pair(key)


def _pair(key: Ed25519PrivateKey) -> KeyPair:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return KeyPair(private, public.decode())
