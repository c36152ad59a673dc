"""Mount host directories in a Linux guest, and unmount them, by a script that runs as root.

The guest may write to a read-only directory, too: an overlay keeps what the guest writes on the
guest's own disk, under the name of the path, and the host's files never change.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from importlib.resources import files

from smolvm_async.config.mounts import Mount
from smolvm_async.controls.ssh.execution import run_apart
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.script import as_root
from smolvm_async.errors import MountError
from smolvm_async.qemu.arguments import share_tag

SCRIPT = "mount.sh"
NO_DRIVER, IN_USE = 4, 5  # exit statuses of the script
QUOTED = 300  # characters of the guest's answer in a message
HINTS = {
    NO_DRIVER: "Use an image whose kernel has the drivers 9pnet_virtio, 9p and overlay, as the "
    "kernels of most distributions do (but not Debian's cloud kernel), or use upload_file().",
    IN_USE: "End the guest's programs that use the directory.",
}


async def mount(link: Link, mounts: Sequence[Mount]) -> None:
    """Mount the directories that are not mounted yet.

    Raises:
        MountError: The guest cannot mount a directory; the hint says what it lacks.
        ConnectionLostError: The guest does not answer.
    """
    overlays = sum(not mount.writable for mount in mounts)
    await _run(link, [f"load {overlays}", *_calls("share", mounts)], "mounted")


async def unmount(link: Link, mounts: Sequence[Mount]) -> None:
    """Unmount the directories; see `mount()`."""
    await _run(link, _calls("release", mounts), "unmounted")


def _calls(function: str, mounts: Sequence[Mount]) -> list[str]:
    return [
        shlex.join((function, share_tag(index), mount.target, kind, _layer(mount.target)))
        for index, mount in enumerate(mounts)
        for kind in ("rw" if mount.writable else "ro",)
    ]


def _layer(target: str) -> str:
    return hashlib.sha256(target.encode()).hexdigest()[:16]


async def _run(link: Link, calls: Sequence[str], done: str) -> None:
    script = files(__package__).joinpath(SCRIPT).read_text()
    whole = "\n".join((script, *calls))
    said = bytearray()
    ended = await run_apart(link, lambda: as_root(whole), said.extend)
    if ended.exit_code is None:
        raise link.lost()
    if ended.exit_code:
        reason = said.decode(errors="replace")[-QUOTED:].strip()
        message = f"A directory of mounts= cannot be {done} in the guest: {reason}."
        raise MountError(message, hint=HINTS.get(ended.exit_code, ""))
