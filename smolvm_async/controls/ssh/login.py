"""The key pairs of a VM's user and SSH server, and the seed disk that passes them to the guest.

This module makes both key pairs before the guest boots, so the guest's host key is known before the
first connection. The built-in image reads its keys from fw_cfg, any other image from a seed disk.
"""

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
    """The address of a guest's SSH server, and the keys to log in with.

    Attributes:
        port: The port on 127.0.0.1.
        user: The user to log in as.
        private_key: The user's private key, in OpenSSH's format.
        host_key: The server's public key, as a line of `authorized_keys`; refuse any other key.
    """

    port: int
    user: str
    private_key: str
    host_key: str

    def __repr__(self) -> str:
        """Hide the private key: programs log and print objects."""
        return f"Access({self.port!r}, {self.user!r}, private_key=..., host_key={self.host_key!r})"


class KeyPair(NamedTuple):
    """An Ed25519 key pair."""

    private: bytes  # in the format of ssh-keygen, without a passphrase
    public: str  # a line of `authorized_keys`

    def __repr__(self) -> str:
        return f"KeyPair(private=..., public={self.public!r})"


def make_key_pair() -> KeyPair:
    """Make a new key pair."""
    # Import it here: the import takes about 50 ms, and a Windows guest needs no key.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return _pair(Ed25519PrivateKey.generate())


def load_key_pair(private: bytes) -> KeyPair:
    """Load a private key, and return its key pair."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    key = load_ssh_private_key(private, None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("this is not an Ed25519 key")
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


class Login(NamedTuple):
    """The user of a VM, the user's key pair, and the key pair of the guest's SSH server."""

    user: str
    key: KeyPair
    host_key: KeyPair

    def access(self, port: int) -> Access:
        """Return the address and the keys to log in through a port of 127.0.0.1."""
        return Access(port, self.user, self.key.private.decode(), self.host_key.public)

    def files(self, config: VMConfig) -> dict[str, bytes]:
        """Return the files for the VM's directory, by name."""
        files = {
            SSH_KEY: self.key.private,
            HOST_KEY: self.host_key.private,
            AUTHORIZED_KEYS: f"{self.key.public}\n".encode(),
        }
        if config.profile.login == "nocloud":
            files[SEED] = make_seed(config.vm_id, self)
        return files


def new_login(config: VMConfig) -> Login:
    """Make a login with new keys."""
    return Login(config.user, make_key_pair(), make_key_pair())


def kept_login(config: VMConfig, directory: Path) -> Login:
    """Read the login of a kept VM from its directory."""
    key, host_key = (load_key_pair((directory / name).read_bytes()) for name in (SSH_KEY, HOST_KEY))
    return Login(config.user, key, host_key)


# A Link runs many commands over one connection. In sshd_config.d, the first file by name wins.
SSHD = {
    "path": "/etc/ssh/sshd_config.d/10-smolvm.conf",
    "content": "MaxSessions 1000\nMaxStartups 1000\n",
}


def cloud_config(hostname: str, login: Login) -> dict[str, Any]:
    """Return the configuration for cloud-init (cloudinit.readthedocs.io, "Cloud config")."""
    config: dict[str, Any] = {
        "hostname": hostname,
        "manage_etc_hosts": "localhost",
        "ssh_pwauth": False,
        "ssh_keys": {
            "ed25519_private": login.host_key.private.decode(),
            "ed25519_public": login.host_key.public,
        },
        "write_files": [SSHD],
    }
    keys = [login.key.public]
    if login.user == "root":
        return {**config, "disable_root": False, "ssh_authorized_keys": keys}
    sudo = "ALL=(ALL) NOPASSWD:ALL"
    account = {"name": login.user, "sudo": sudo, "ssh_authorized_keys": keys}
    # cloud-init gives this name to the image's default user, who keeps the shell and the groups.
    return {**config, "user": account, "users": ["default"]}


def make_seed(hostname: str, login: Login) -> bytes:
    """Make a NoCloud seed: a small disk from which cloud-init reads user, keys and host name.

    The disk has an ISO 9660 file system named `cidata`. cloud-init creates the user, with sudo,
    unless it is `root`. The host name is also the instance id: cloud-init runs once for each id.
    """
    import pycdlib

    config = json.dumps(cloud_config(hostname, login))  # JSON is valid YAML
    files = {
        "meta-data": json.dumps({"instance-id": hostname, "local-hostname": hostname}),
        "user-data": f"#cloud-config\n{config}",
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
