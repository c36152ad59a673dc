"""Run a command under restrictions that containers and service managers set (x86-64).

restricted.py RESTRICTION ... -- COMMAND, where a restriction is one of

- `CALL=ERRNO`: a seccomp filter refuses the system call with this error, or kills the process
  (`CALL=KILL`); `socket:FAMILY=ERRNO` refuses only one address family, as systemd's
  RestrictAddressFamilies= does;
- `listener`: another program answers system calls of this process, as a container's may do;
- `mdwe`: no memory can become executable, as with systemd's MemoryDenyWriteExecute=;
- `RLIMIT_NAME=NUMBER`: a resource limit, as with `ulimit`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import struct
import sys

CALLS = {
    "flock": 73,
    "link": 86,
    "linkat": 265,
    "memfd_create": 319,
    "mprotect": 10,
    "prctl": 157,
    "process_vm_readv": 310,
    "pidfd_getfd": 438,
    "pidfd_open": 434,
    "pidfd_send_signal": 424,
    "seccomp": 317,
    "socket": 41,
    "waitid": 247,
}
PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, SECCOMP = 38, 65, 317
NEW_LISTENER = 8  # SECCOMP_FILTER_FLAG_NEW_LISTENER
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # <linux/bpf_common.h>, with BPF_W | BPF_ABS, BPF_K
NUMBER, ARGUMENT = 0, 16  # offsets in `struct seccomp_data`
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000

libc = ctypes.CDLL(None, use_errno=True)


def rule(text: str) -> list[tuple[int, int, int, int]]:
    """Return the steps of a filter that refuse one system call."""
    call, _, code = text.partition("=")
    name, _, family = call.partition(":")
    answer = KILL if code == "KILL" else REFUSE | getattr(errno, code)
    if not family:
        return [(EQUAL, 0, 1, CALLS[name]), (RETURN, 0, 0, answer)]
    return [
        (EQUAL, 0, 4, CALLS[name]),
        (LOAD, 0, 0, ARGUMENT),
        (EQUAL, 0, 1, getattr(socket, family)),
        (RETURN, 0, 0, answer),
        (LOAD, 0, 0, NUMBER),
    ]


def install(rules: list[str], flags: int = 0) -> int:
    """Install a filter in this process, which the command inherits; return the kernel's answer."""
    steps = [(LOAD, 0, 0, NUMBER)]
    for text in rules:
        steps += rule(text)
    steps.append((RETURN, 0, 0, ALLOW))
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(buffer))
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    answer = libc.syscall(SECCOMP, 1, flags, header)
    assert answer >= 0, os.strerror(ctypes.get_errno())
    return int(answer)


def main(restrictions: list[str], command: list[str]) -> None:
    for text in restrictions:
        name, _, number = text.partition("=")
        if name.startswith("RLIMIT_"):
            resource.setrlimit(getattr(resource, name), (int(number), int(number)))
        elif name == "mdwe":
            assert libc.prctl(PR_SET_MDWE, 1, 0, 0, 0) == 0
        elif name == "listener":
            os.set_inheritable(install([], NEW_LISTENER), True)
    rules = [text for text in restrictions if "=" in text and not text.startswith("RLIMIT_")]
    if rules:
        install(rules)
    os.execvp(command[0], command)


if __name__ == "__main__":
    end = sys.argv.index("--")
    main(sys.argv[1:end], sys.argv[end + 1 :])
