"""The keys of a VM: for its user and its SSH server, and how the guest gets them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.state.names import AUTHORIZED_KEYS, HOST_KEY, SEED, SSH_KEY

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


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


# A name that sorts first wins in sshd_config.d; the library runs many commands over a connection.
SSHD = {
    "path": "/etc/ssh/sshd_config.d/10-smolvm.conf",
    "content": "MaxSessions 1000\nMaxStartups 1000\n",
}


def cloud_config(hostname: str, user: str, key: KeyPair, host_key: KeyPair) -> dict[str, Any]:
    """What cloud-init shall do (cloudinit.readthedocs.io, "Cloud config"); JSON is YAML too."""
    config: dict[str, Any] = {
        "hostname": hostname,
        "manage_etc_hosts": "localhost",
        "ssh_pwauth": False,
        "ssh_keys": {
            "ed25519_private": host_key.private.decode(),
            "ed25519_public": host_key.public,
        },
        "write_files": [SSHD],
    }
    if user == "root":
        return {**config, "disable_root": False, "ssh_authorized_keys": [key.public]}
    sudo = "ALL=(ALL) NOPASSWD:ALL"
    account = {"name": user, "sudo": sudo, "ssh_authorized_keys": [key.public]}
    # The image's own default user under this name, with the shell and the groups that it has.
    return {**config, "user": account, "users": ["default"]}


def make_seed(hostname: str, user: str, key: KeyPair, host_key: KeyPair) -> bytes:
    """The image of the disk: an ISO 9660 file system named `cidata`.

    Args:
        hostname: The guest's, and the instance's id: cloud-init acts once for each.
        user: `root`, or the name of a user that cloud-init makes, with sudo.
        key: Who may log in.
        host_key: By which the guest is known.
    """
    import pycdlib

    files = {
        "meta-data": json.dumps({"instance-id": hostname, "local-hostname": hostname}),
        "user-data": "#cloud-config\n" + json.dumps(cloud_config(hostname, user, key, host_key)),
    }
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for number, (name, text) in enumerate(files.items()):
        content = text.encode()
        iso.add_fp(
            io.BytesIO(content),
            len(content),
            f"/FILE{number}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
        )
    image = io.BytesIO()
    iso.write_fp(image)
    iso.close()
    return image.getvalue()


class Login(NamedTuple):
    """A VM's own two key pairs.

    Attributes:
        key: Ours.
        host_key: The guest's, known before it boots.
    """

    user: str
    key: KeyPair
    host_key: KeyPair

    def access(self, port: int) -> Access:
        """How to log in."""
        return Access(port, self.user, self.key.private.decode(), self.host_key.public)

    def files(self, config: VMConfig) -> dict[str, bytes]:
        """The VM's directory gets these, by name."""
        files = {
            SSH_KEY: self.key.private,
            HOST_KEY: self.host_key.private,
            AUTHORIZED_KEYS: f"{self.key.public}\n".encode(),
        }
        if config.profile.login == "nocloud":
            files[SEED] = make_seed(config.vm_id, self.user, self.key, self.host_key)
        return files


def new_login(config: VMConfig) -> Login:
    """Make new keys."""
    return Login(config.user, make_key_pair(), make_key_pair())


def kept_login(config: VMConfig, directory: Path) -> Login:
    """The keys that a kept VM was made with.

    Raises:
        OSError: If they cannot be read.
    """
    key, host_key = (load_key_pair((directory / name).read_bytes()) for name in (SSH_KEY, HOST_KEY))
    return Login(config.user, key, host_key)
