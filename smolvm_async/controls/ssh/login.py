"""Who may log in to a guest over SSH, and how the guest is told: files in the VM's directory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.controls.ssh.access import Access
from smolvm_async.controls.ssh.keys import KeyPair, load_key_pair, make_key_pair
from smolvm_async.controls.ssh.seed import make_seed
from smolvm_async.state.names import AUTHORIZED_KEYS, HOST_KEY, SEED, SSH_KEY


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
