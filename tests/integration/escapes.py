"""Attempts of a guest's root to leave the host directories that it sees; runs in the guest.

The arguments are the paths of a read-only and of a writable directory. The host has a file `secret`
beside both, to which a symbolic link `out` in each leads. Print one line for each attempt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from stat import S_IFBLK, S_IFCHR

overlay, writable, host = (Path(path) for path in sys.argv[1:])
lower = Path("/run/smolvm/shares/mount0")  # the read-only directory itself, below the overlay


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout


def read(path: Path) -> str:
    return path.read_text()


def link(target: str, name: str) -> str:
    (writable / name).symlink_to(target)
    return read(writable / name)


def node(kind: int, major: int, minor: int, name: str) -> str:
    os.mknod(writable / name, 0o666 | kind, os.makedev(major, minor))
    return f"made {name}"


def change(name: str, work: Callable[[Path], object]) -> str:
    path = writable / name
    path.write_text("own")
    work(path)
    return read(path)


def write_to(path: Path) -> str:
    path.write_text("changed")
    return "written"


def swap() -> str:
    """Replace a directory by a link again and again while its file is read through it."""
    (writable / "turn").mkdir()
    found = set()
    for _ in range(3):
        (writable / "turn").rmdir()
        (writable / "turn").symlink_to("..")
        try:
            found.add(read(writable / "turn" / "secret"))
        except OSError as error:
            found.add(str(error))
        (writable / "turn").unlink()
        (writable / "turn").mkdir()
    return " ".join(found)


def mount_again(tag: str, name: str) -> str:
    for mounted in (overlay, lower):
        run("umount", str(mounted))
    where = Path("/tmp/again")
    where.mkdir(exist_ok=True)
    run("mount", "-t", "9p", "-o", f"trans=virtio,version=9p2000.L,aname={name}", tag, str(where))
    try:
        return " ".join([*os.listdir(where), read(where / "secret")])
    finally:
        run("umount", str(where))


run("mount", "-o", "remount,rw", str(lower))
ATTEMPTS: dict[str, Callable[[], object]] = {
    "parent of a read-only directory": lambda: read(lower / ".." / "secret"),
    "parent of a writable directory": lambda: read(writable / ".." / "secret"),
    "the host's link, read-only": lambda: read(overlay / "out"),
    "the host's link, below the overlay": lambda: read(lower / "out"),
    "the host's link, writable": lambda: read(writable / "out"),
    "the host's link, written": lambda: write_to(writable / "out"),
    "an absolute link": lambda: link(f"{host}/secret", "absolute"),
    "a relative link": lambda: link("../secret", "relative"),
    "a link to a directory": lambda: link("..", "directory"),
    "a link to /etc": lambda: link("/etc/shadow", "shadow"),
    "a link over the host's file": lambda: os.symlink("../secret", writable / "new"),
    "a disk": lambda: node(S_IFBLK, 8, 0, "disk"),
    "the memory": lambda: node(S_IFCHR, 1, 1, "memory"),
    "a FIFO": lambda: os.mkfifo(writable / "fifo"),
    "a hard link to the secret": lambda: os.link(f"{host}/secret", writable / "hard"),
    "a hard link to the parent's file": lambda: os.link(writable / "../secret", writable / "hard"),
    "a rename to the parent": lambda: os.rename(writable / "b", writable / "../secret"),
    "a rename of the root": lambda: os.rename(writable, writable / "x"),
    "a setuid file": lambda: change("setuid", lambda path: path.chmod(0o4755)),
    "another owner": lambda: change("owner", lambda path: os.chown(path, 1234, 1234)),
    "QEMU's own attribute": lambda: change(
        "mode", lambda path: os.setxattr(path, "user.virtfs.mode", b"\xff\x89\0\0")
    ),
    "a capability": lambda: change(
        "capability", lambda path: run("setcap", "cap_sys_admin+ep", str(path))
    ),
    "a directory that becomes a link": swap,
    "a write to a read-only file": lambda: write_to(lower / "a"),
    "a new read-only file": lambda: write_to(lower / "new"),
    "a removed read-only file": lambda: (lower / "a").unlink(),
    "a renamed read-only file": lambda: os.rename(lower / "a", lower / "z"),
    "a read-only mode": lambda: (lower / "a").chmod(0o777),
    "a read-only attribute": lambda: os.setxattr(lower / "a", "user.x", b"x"),
    "a read-only size": lambda: os.truncate(lower / "a", 0),
    "a FIFO of the host": lambda: os.close(os.open(lower / "pipe", os.O_RDONLY | os.O_NONBLOCK)),
    "another root": lambda: mount_again("mount0", "/.."),  # the last one: it unmounts
}
for name, attempt in ATTEMPTS.items():
    try:
        result = attempt()
    except OSError as error:
        result = error
    print(f"{name}: {result}".replace("\n", " "))
