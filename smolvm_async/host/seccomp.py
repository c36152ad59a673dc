"""System calls of other processes that this process answers: seccomp user notification.

`install` puts a filter on the calling thread alone. Its children inherit the filter. Each call that
the filter selects then waits until this process answers: `receive` returns the call, and `answer`
ends the wait. The filter selects the calls that name the other end of a socket. It refuses the
calls that could do the same unseen, and kills a process that makes system calls of another ABI.

An answer can let the kernel make the call. The caller could then change the address in its memory
after the check. So make the call here, on a duplicate of the caller's descriptor, see
`take_descriptor`, with the checked address, and answer with the result.

When nobody has the listener any more, all selected calls fail with ENOSYS. Linux 5.9 or newer is
needed; none of this needs privileges. See seccomp(2) and seccomp_unotify(2).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import select
import signal
import struct
import sys
from typing import NamedTuple

from smolvm_async.errors import HostError
from smolvm_async.foundation.process import exit_code
from smolvm_async.host.restrictions import SYS_SECCOMP, has_filter, strict_yama, without_guard

# Unlike CDLL, PyDLL keeps the interpreter's lock during a call. To get the lock back beside a busy
# thread takes 5 ms, and none of these calls waits.
_libc = ctypes.PyDLL(None, use_errno=True)

PR_SET_NO_NEW_PRIVS = 38  # prctl(2)
SYS_PIDFD_GETFD = 438  # on all architectures

# <linux/seccomp.h>
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1 << 2  # do not slow the processor's speculation down
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 1 << 5  # Linux 5.19: only SIGKILL interrupts the wait
SECCOMP_RET_KILL_PROCESS = 0x80000000
SECCOMP_RET_USER_NOTIF = 0x7FC00000
SECCOMP_RET_ERRNO = 0x00050000
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_IOCTL_NOTIF_RECV = 0xC0502100
SECCOMP_IOCTL_NOTIF_SEND = 0xC0182101
SECCOMP_IOCTL_NOTIF_ID_VALID = 0x40082102
SECCOMP_IOCTL_NOTIF_SET_FLAGS = 0x40082104
SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP = 1  # Linux 6.6: a faster change between the two threads
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1

NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
RESPONSE = struct.Struct("=QqiI")  # struct seccomp_notif_resp
NUMBER, ARCHITECTURE, ADDRESS = 0, 4, 48  # offsets in struct seccomp_data; the fifth argument
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
ATTEMPT = (
    "import ctypes, sys\nfor call in sys.argv[1:]: ctypes.CDLL(None).syscall(int(call), *[-1] * 6)"
)
X32 = 0x40000000  # the numbers of the x32 ABI begin here


class Machine(NamedTuple):
    """The numbers of a processor architecture: its ABI in filters, and those of system calls."""

    audit: int
    seccomp: int
    connect: int
    sendto: int
    recvfrom: int
    sendmmsg: int
    process_vm_readv: int
    process_vm_writev: int
    io_uring_setup: int = 425


MACHINES = {
    "x86_64": Machine(0xC000003E, SYS_SECCOMP["x86_64"], 42, 44, 45, 307, 310, 311),
    "aarch64": Machine(0xC00000B7, SYS_SECCOMP["aarch64"], 203, 206, 207, 269, 270, 271),
}


class Call(NamedTuple):
    """A call that waits for an answer.

    Attributes:
        id: The kernel's id of the notification.
        thread: The id of the calling thread.
        number: The number of the system call.
        arguments: Its six arguments.
    """

    id: int
    thread: int
    number: int
    arguments: tuple[int, ...]


def this_machine() -> Machine:
    """Return the numbers of this host's architecture.

    Raises:
        OSError: The architecture is not known here.
    """
    try:
        return MACHINES[platform.machine()]
    except KeyError:
        raise OSError(errno.ENOSYS, f"not supported on {platform.machine()}") from None


def program(machine: Machine) -> bytes:
    """Return the filter, a program for the kernel's classic BPF."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # <linux/bpf_common.h>

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    def decide(number: int, action: int) -> list[bytes]:
        return [step(equal, number, 0, 1), step(give, action)]

    def decide_with_address(number: int) -> list[bytes]:
        """Select the call if it has an address: not send(2) and recv(2) of a connected socket."""
        return [
            step(equal, number, 0, 6),
            step(load, ADDRESS),
            step(equal, 0, 0, 2),
            step(load, ADDRESS + 4),
            step(equal, 0, 1, 0),
            step(give, SECCOMP_RET_USER_NOTIF),
            step(give, SECCOMP_RET_ALLOW),
        ]

    refuse = SECCOMP_RET_ERRNO | errno.ENOSYS
    steps = [
        step(load, ARCHITECTURE),
        step(equal, machine.audit, 1, 0),
        step(give, SECCOMP_RET_KILL_PROCESS),
        step(load, NUMBER),
    ]
    if machine is MACHINES["x86_64"]:
        steps += [step(at_least, X32, 0, 1), step(give, SECCOMP_RET_KILL_PROCESS)]
    steps += [
        *decide(machine.connect, SECCOMP_RET_USER_NOTIF),
        *decide(machine.sendmmsg, refuse),
        *decide(machine.io_uring_setup, refuse),
        *decide_with_address(machine.sendto),
        *decide_with_address(machine.recvfrom),
        step(give, SECCOMP_RET_ALLOW),
    ]
    return b"".join(steps)


class _Program(ctypes.Structure):  # struct sock_fprog
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install() -> int:
    """Put the filter on the calling thread, for ever, and return the listener's descriptor.

    The thread and its children can gain no privileges any more.

    Raises:
        OSError: The host refuses.
    """
    machine = this_machine()
    steps = program(machine)
    _checked("prctl", _libc.prctl(PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_SPEC_ALLOW
    arguments = (
        ctypes.c_long(machine.seccomp),
        ctypes.c_ulong(SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV),
        ctypes.byref(_Program(len(steps) // 8, steps)),
    )
    listener = _libc.syscall(*arguments)
    if listener < 0 and ctypes.get_errno() == errno.EINVAL:  # before Linux 5.19
        listener = _libc.syscall(*arguments[:2], ctypes.c_ulong(flags), arguments[3])
    _checked("seccomp", listener)
    flag = ctypes.c_ulong(SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
    _ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, flag)  # an older kernel refuses
    return int(listener)


def check_seccomp() -> None:
    """Check all calls of this module but `install`, on this process itself.

    Raises:
        HostError: The host refuses one of them.
        OSError: The host lacks memory or descriptors now.
    """
    try:
        if call := _deadly_call(this_machine()):
            raise OSError(errno.EPERM, f"{call}(2) kills its caller")
        if strict_yama():  # this process itself is no measure for its children
            raise PermissionError(errno.EPERM, "pidfd_getfd(2)")
        pidfd = os.pidfd_open(os.getpid())
        try:
            os.close(take_descriptor(pidfd, pidfd))
        finally:
            os.close(pidfd)
        sample = ctypes.create_string_buffer(b"sample")
        at = ctypes.addressof(sample)
        write_memory(os.getpid(), at, read_memory(os.getpid(), at, 6))
    except OSError as error:
        raise refused(error) from error


@functools.cache
def _deadly_call(machine: Machine) -> str:
    """Return the name of a call whose caller an outer filter kills; usually there is none.

    A program tries the calls in the place of this process, with arguments that are always wrong.
    """
    if not has_filter():
        return ""
    calls = {
        "seccomp": machine.seccomp,
        "pidfd_getfd": SYS_PIDFD_GETFD,
        "process_vm_readv": machine.process_vm_readv,
        "process_vm_writev": machine.process_vm_writev,
    }
    python = [sys.executable, "-I", "-S", "-c", ATTEMPT]

    def deadly(*numbers: int) -> bool:
        return exit_code([*python, *map(str, numbers)]) == -signal.SIGSYS

    if not deadly(*calls.values()):
        return ""
    return next((name for name, number in calls.items() if deadly(number)), "seccomp")


def refused(error: OSError) -> HostError:
    """Return the error for a host that refuses a call of this module.

    Raises:
        OSError: The host does not refuse, but lacks memory or descriptors now.
    """
    if error.errno in SHORTAGES:
        raise error
    reason, cure = without_guard(error)
    return HostError(f"A guest's network cannot be guarded: {reason}.", hint=cure)


def receive(listener: int, timeout: float | None = None) -> Call | None:
    """Wait for the next call; `None` if there is none, since the caller was killed meanwhile.

    Raises:
        EOFError: No process has the filter any more.
        OSError: The kernel refuses.
    """
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    events = poll.poll(None if timeout is None else timeout * 1000)
    if any(event & (select.POLLHUP | select.POLLNVAL) for _, event in events):
        raise EOFError
    buffer = ctypes.create_string_buffer(NOTIFICATION.size)  # the kernel wants zeros
    if not events or _ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, buffer) < 0:
        if events and ctypes.get_errno() not in (errno.ENOENT, errno.EINTR):
            _checked("ioctl", -1)
        return None
    found, thread, _, number, _, _, *arguments = NOTIFICATION.unpack(buffer)
    return Call(found, thread, number, tuple(arguments))


def answer(listener: int, call: Call, result: int | None, error: int = 0) -> None:
    """End the wait of a call. It returns `result`, or fails with `error`; `None`: it goes on."""
    flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE if result is None and not error else 0
    response = RESPONSE.pack(call.id, 0 if error else result or 0, -error, flags)
    _ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, response)  # fails if the caller was killed


def check_waiting(listener: int, call: Call) -> None:
    """Check that a call still waits: otherwise, its thread's id may be that of another process.

    Raises:
        ProcessLookupError: It does not wait any more.
    """
    if _ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, struct.pack("=Q", call.id)) < 0:
        raise ProcessLookupError(errno.ESRCH, "the caller was killed")


def find_process(thread: int) -> tuple[int, int]:
    """Return the id of a thread's process, and a pidfd for the process."""
    with open(f"/proc/{thread}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    pid = int(fields["Tgid"])
    return pid, os.pidfd_open(pid)


def take_descriptor(pidfd: int, number: int) -> int:
    """Return a duplicate of another process's descriptor."""
    call = (ctypes.c_long(SYS_PIDFD_GETFD), ctypes.c_long(pidfd), ctypes.c_long(number))
    return _checked("pidfd_getfd", _libc.syscall(*call, ctypes.c_long(0)))


def read_memory(thread: int, address: int, size: int) -> bytes:
    """Return at most `size` bytes of a process's memory; fewer where its memory ends."""
    buffer = ctypes.create_string_buffer(size)
    count = _transfer(_libc.process_vm_readv, thread, address, buffer)
    return buffer.raw[:count]


def write_memory(thread: int, address: int, data: bytes) -> None:
    """Write to a process's memory."""
    buffer = ctypes.create_string_buffer(data, len(data))
    _transfer(_libc.process_vm_writev, thread, address, buffer)


def _transfer(call: object, thread: int, address: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    pair = ctypes.c_size_t * 2  # struct iovec
    ours = pair(ctypes.addressof(buffer), len(buffer))
    theirs = pair(address, len(buffer))
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    assert callable(call)
    return _checked("process_vm_readv", call(thread, ours, one, theirs, one, none))


def _ioctl(fd: int, request: int, argument: object) -> int:
    return int(_libc.ioctl(fd, ctypes.c_ulong(request), argument))


def _checked(call: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}(2): {os.strerror(number)}")
    return result
