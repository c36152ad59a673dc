"""A NoCloud seed: the small disk from which cloud-init takes user, keys and host name."""

from __future__ import annotations

import io
import json
from typing import Any

from smolvm_async.controls.ssh.keys import KeyPair

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
