"""A host's claim on a VM's directory, which excludes other hosts.

The lock on the directory excludes the other processes of this host. On a shared file system, it may
not exclude other hosts: two hosts could start one kept VM, and destroy its disk. So a process that
has locked the directory also claims it for its host, and removes the claim before it unlocks the
directory. The claim is a hard link with a fixed name: link(2) is atomic on shared file systems too,
fails if the name exists, and shows the content, which is the host and the process, at once.

A process that dies leaves its claim. The next process that has the lock replaces the claim, if the
process id or the lock proves to it that the other process is dead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os

from smolvm_async.foundation.process import Identity, own_identity
from smolvm_async.host.identity import HostIdentity, Relation, relation, this_host
from smolvm_async.state.names import CLAIM
from smolvm_async.state.record import beyond_reach


def claim(dir_fd: int, gone_host: str | None) -> HostIdentity | None:
    """Claim a directory that this process has locked; return the host that has claimed it already.

    Replace the claim of this host's dead processes, and of a host with the name `gone_host`.
    """
    here = this_host()
    while not _link(dir_fd, here):
        found = _read(dir_fd)
        if found is not None:
            host, process = found
            related = relation(host, here)
            if related is Relation.SAME_PIDS:
                lives = process.alive and process.pid != os.getpid()
            else:
                lives = beyond_reach(related, dir_fd) and host.name != gone_host
            if lives:
                return host
        with contextlib.suppress(FileNotFoundError):
            os.unlink(CLAIM, dir_fd=dir_fd)
    return None


def unclaim(dir_fd: int) -> None:
    """Remove the claim, if it exists."""
    with contextlib.suppress(OSError):  # the directory may be gone
        os.unlink(CLAIM, dir_fd=dir_fd)


def _link(dir_fd: int, here: HostIdentity) -> bool:
    new = f"{CLAIM}.{os.urandom(4).hex()}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(new, flags, 0o600, dir_fd=dir_fd), "wb") as file:
            file.write(json.dumps([here, own_identity()]).encode())
        os.link(new, CLAIM, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new, dir_fd=dir_fd)
    return True


def _read(dir_fd: int) -> tuple[HostIdentity, Identity] | None:
    """Return the host and the process that claimed the directory; `None` if this is not a claim."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        with open(os.open(CLAIM, flags, dir_fd=dir_fd), "rb") as file:
            host, process = json.loads(file.read(4096))
            return HostIdentity(*map(str, host)), Identity(*map(int, process))
    except (ValueError, TypeError, RecursionError):
        return None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        return None
