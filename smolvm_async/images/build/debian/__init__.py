"""The built-in Linux: a Debian or Ubuntu, built once from the host's package sources, without root.

Why a guest configures the packages. A package is installed in two steps: its files are unpacked,
then its maintainer scripts configure it. The scripts need root and a running system of their own
(they create users, run programs from the package, call systemd's and dpkg's tools), and a builder
without root has neither. So the build goes like this:

1. `apt-get` downloads the packages (`packages`).
2. `tar` unpacks them into a directory, without root (`root`). Owners and special modes, which only
   root can set, are written to a list instead.
3. dpkg's database is written as if dpkg had unpacked the packages itself (`root`).
4. `mke2fs -d` makes a file system from the directory, without mounting it (`disk`).
5. QEMU boots that file system once. Process 1 is `guest/configure.sh`, which is root there: it runs
   `dpkg --configure -a`, then sets the owners and modes from the list (`disk`).
6. The result becomes a read-only qcow2 in a directory named by a key of its packages and its recipe
   (`builder`).

VMs boot the disk with a kernel that QEMU loads, and with a small init, `guest/init.sh`, that starts
an SSH server and little else.
"""

from __future__ import annotations

from smolvm_async.images.build.debian.builder import (
    DebianImage,
    build_debian,
    check_host,
    find_debian,
)

__all__ = ["DebianImage", "build_debian", "check_host", "find_debian"]
