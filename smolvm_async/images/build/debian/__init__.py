"""The built-in Linux: a Debian or Ubuntu, built once from the host's package sources, without root.

A guest configures the packages, since the builder does not have root. A package is installed in two
steps: its files are unpacked, then its maintainer scripts configure it. The scripts need root and
their own running system: they create users, run programs from the package, and call tools of
systemd and dpkg. So the image is built as follows:

1. `apt-get` downloads the packages (`packages`).
2. `tar` unpacks them into a directory, without root (`root`). Only root can set owners and special
   modes, so the builder writes them to a list instead.
3. The builder writes dpkg's database as if dpkg itself had unpacked the packages (`root`).
4. `mke2fs -d` makes a file system from the directory, without mounting it (`disk`).
5. QEMU boots this file system once. Process 1 is `guest/configure.sh`. As root, it runs
   `dpkg --configure -a`, then sets the owners and modes from the list (`disk`).
6. The builder converts the file system to a read-only qcow2 in a directory whose name is a hash of
   its packages and its recipe (`builder`).

For a VM with this disk, QEMU loads the kernel. Process 1 is a small init, `guest/init.sh`, which
starts an SSH server, the parked process (`guest/parked.pl`), and little else.
"""

from __future__ import annotations

from smolvm_async.images.build.debian.builder import (
    DebianImage,
    build_debian,
    check_host,
    find_debian,
)

__all__ = ["DebianImage", "build_debian", "check_host", "find_debian"]
