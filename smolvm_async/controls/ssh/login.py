"""The keys of a VM's user and SSH server, and the seed disk that passes them to the guest.

This module makes both key pairs before the guest boots, so the guest's host key is known before the
first connection. The built-in image reads its keys from fw_cfg, any other image from a seed disk.

A Windows image has an account and a host key of its own. The first login shows the host key; the
VM's directory keeps the key, and every later login requires this key.
"""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smolvm_async.config.checks import shown
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.files import replace_file
from smolvm_async.state.names import AUTHORIZED_KEYS, HOST_KEY, KNOWN_HOST, SEED, SSH_KEY

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class Access(NamedTuple):
    """The address of a guest's SSH server, and the keys to log in with.

    Attributes:
        port: The port on 127.0.0.1.
        user: The user to log in as.
        private_key: The user's private key, in OpenSSH's format; of an image's own user, the
            content of the file, or empty.
        host_key: The server's public key, as a line of `authorized_keys`; refuse any other key.
            Empty before the first login to an image's own server.
        password: The password of an image's own user; empty if there is none.
        key_file: The file of the private key of an image's own user; empty if there is none.
    """

    port: int
    user: str
    private_key: str
    host_key: str
    password: str = ""
    key_file: str = ""

    def __repr__(self) -> str:
        """Hide the secrets: programs log and print objects."""
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


class ImageLogin(NamedTuple):
    """An account that the image has, and the host key that its SSH server has shown, if any."""

    user: str
    password: str
    private_key: str
    host_key: str = ""
    key_file: str = ""

    def __repr__(self) -> str:
        return f"ImageLogin({self.user!r}, ..., host_key={self.host_key!r})"

    def access(self, port: int) -> Access:
        """Return the address and the secrets to log in through a port of 127.0.0.1."""
        private, password = self.private_key, self.password
        return Access(port, self.user, private, self.host_key, password, self.key_file)

    def remember(self, host_key: str, directory: Path) -> ImageLogin:
        """Store the host key in the VM's directory, and return the login with this key."""
        replace_file(directory / KNOWN_HOST, f"{host_key}\n".encode(), mode=0o600)
        return self._replace(host_key=host_key)


def image_login(config: VMConfig, directory: Path) -> ImageLogin:
    """Return the login to an image's own server. Read the host key from a VM's directory.

    Raises:
        ConfigError: The private key cannot be used.
    """
    private_key = read_key(config.key) if config.key else ""
    if private_key:
        import asyncssh  # this takes 0.3 s: call this function in a thread

        try:
            asyncssh.import_private_key(private_key)
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
            raise ConfigError(
                f"key={shown(config.key)} cannot be used: {error}.",
                hint="Pass a private key of OpenSSH without a passphrase.",
            ) from error
    known = directory / KNOWN_HOST
    host_key = known.read_text().strip() if known.exists() else ""
    return ImageLogin(config.user, config.password or "", private_key, host_key, config.key)


MOST_KEY = 1 << 16  # bytes of a file with a private key


def read_key(path: str) -> str:
    """Read the file of a private key.

    Raises:
        ConfigError: The file cannot be read, is not a private key, or other users can read it.
    """
    try:
        with open(path, "rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read(MOST_KEY)
    except OSError as error:
        raise ConfigError(f"key={shown(path)} cannot be read: {error}.") from error
    if b"PRIVATE KEY-----" not in content:
        reason = "is not a private key: pass the file without `.pub`, in the format of ssh-keygen"
        raise ConfigError(f"key={shown(path)} {reason}.")
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"key={shown(path)} can be used by other users of this host.",
            hint=f"Close the file for them: chmod 600 {path}",
        )
    return content.decode(errors="replace")


def check_account(config: VMConfig) -> None:
    """Check that the secrets are there for an image's own SSH server.

    Raises:
        ConfigError: They are missing, or the private key cannot be used.
    """
    if config.profile.login != "image":
        return
    if config.key:
        read_key(config.key)
    elif config.password is None:
        raise ConfigError(
            f"password= is missing, to log in to the image's SSH server as {config.user!r}: pass "
            "password= or key=. No VM stores its password: pass password= to from_id() and "
            "from_snapshot(), too."
        )


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
