"""Restrictions of the host that make a start fail, and where each of them is set.

A container, a service manager, a resource limit or a file system can refuse something that QEMU or
this library needs. The error message then names the operation, but not the party that refused the
operation. `find_cause` looks up the message in `CAUSES`, where one row is one cause. A message can
have several causes, so each row also tries the operation, or reads the limit, and answers only if
this shows the cause. If no row answers, the cause is unknown: nobody should guess a cure.

A row runs only after the operation has failed with an error. So a seccomp filter that kills the
caller, instead of returning an error, does not kill this process: see the row for SIGSYS.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import re
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from smolvm_async.host.accelerator import Problem
from smolvm_async.host.distribution import QEMU, how_to_install
from smolvm_async.host.file_systems import MIB, find_file_system

SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}  # the number of seccomp(2)
SECCOMP_GET_ACTION_AVAIL = 2  # <linux/seccomp.h>; this changes nothing
PR_GET_DUMPABLE = 3
PR_GET_MDWE = 66  # prctl(2), Linux 6.3

OLDEST_GUARD = (5, 9)  # Linux
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
CAP_SYS_PTRACE = 19  # capabilities(7)

FILTER = (
    "Allow {} where it is refused: for a container, docker run --security-opt seccomp=PROFILE.json "
    "(or seccomp=unconfined); for a systemd unit, {}."
)


class Failure(NamedTuple):
    """A failure to explain.

    Attributes:
        text: The message of the system, of QEMU or of another program.
        path: The file or directory concerned, if it is known.
    """

    text: str
    path: Path | None = None


class Cause(NamedTuple):
    """A row of the table: a cause of failures.

    Attributes:
        signs: A pattern of the messages that the cause can have.
        find: Returns the problem if it finds the cause on this host, otherwise `None`.
    """

    signs: str
    find: Callable[[Failure], Problem | None]


def find_cause(text: str, path: Path | None = None) -> Problem | None:
    """Return the restriction of this host that has caused a failure; `None` if it is unknown."""
    failure = Failure(text, path)
    for cause in CAUSES:
        if re.search(cause.signs, text) and (problem := cause.find(failure)) is not None:
            return problem
    return None


def find_restrictions() -> list[Problem]:
    """Try the operations that a VM needs and that no other check of the doctor tries."""
    found = (attempt(Failure("")) for attempt in (_no_proc, _address_family, _loopback, _memfd))
    return [problem for problem in found if problem is not None]


# Seccomp filters and other filters of system calls


def _killed(failure: Failure) -> Problem | None:
    if not has_filter():
        return None
    return Problem(
        "a seccomp filter killed it with SIGSYS: this container or service, or the sandbox "
        "of QEMU or swtpm, forbids a system call",
        FILTER.format("the system call", "SystemCallFilter=")
        + " The kernel's log names the system call: journalctl -k | grep SECCOMP.",
    )


def has_filter() -> bool:
    """Return whether this process has a seccomp filter, as a container's or a service's."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return re.search(r"(?m)^Seccomp:\s*[12]$", status) is not None
    return False


def _refused(call: str, refusal: str | None, use: str = "", extra: str = "") -> Problem:
    """Return the problem of a refused system call; `use` says for what the call is needed."""
    setting = f"SystemCallFilter=@system-service{extra}"
    reason = f"this host refuses the system call {call}(2){use} ({refusal})"
    return Problem(reason, FILTER.format(f"{call}(2)", setting))


def _seccomp(failure: Failure) -> Problem | None:
    if (number := SYS_SECCOMP.get(platform.machine())) is None:
        return None
    import ctypes

    libc, kill = ctypes.CDLL(None, use_errno=True), ctypes.c_uint32(0x80000000)
    if libc.syscall(number, SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(kill)) == 0:
        return None
    refusal = os.strerror(ctypes.get_errno())
    use = ", with which QEMU and swtpm set up their sandboxes"
    return _refused("seccomp", refusal, use, " seccomp (or none)")


def without_guard(error: OSError) -> Problem:
    """Return why a guest's network cannot be guarded; `error` is of `host/seccomp.py`."""
    call = re.match(r"(\w+)\(2\)", error.strerror or "")
    if error.errno == errno.EBUSY:
        return Problem(
            "another program, such as a container runtime, already answers system calls of this "
            "process, and the kernel allows only one",
            "Start this process outside of that container or service, or with a seccomp profile "
            "without SCMP_ACT_NOTIFY.",
        )
    if error.errno == errno.EPERM and (scope := strict_yama()):
        return Problem(
            f"kernel.yama.ptrace_scope={scope} keeps this process from the descriptors of QEMU, "
            "its own child",
            "Lower the setting: sysctl -w kernel.yama.ptrace_scope=1 (from 3, after a reboot).",
        )
    if _kernel() < OLDEST_GUARD or platform.machine() not in SYS_SECCOMP:
        found = f"Linux {platform.release()} on {platform.machine()} has no way to do so"
        return Problem(found, "Use Linux 5.9 or newer on x86_64 or aarch64.")
    name = call[1] if call else "pidfd_open"
    return _refused(name, os.strerror(error.errno or errno.EPERM), extra=f" {name}")


def strict_yama() -> int:
    """Return Yama's setting if it keeps this process from its children's descriptors; otherwise 0.

    Setting 1, which Ubuntu has, allows a process its own children.
    """
    try:
        scope = int(YAMA.read_text())
        status = Path("/proc/self/status").read_text()
    except OSError:  # a kernel without Yama
        return 0
    effective = re.search(r"(?m)^CapEff:\s*(\w+)$", status)
    privileged = effective is not None and int(effective[1], 16) >> CAP_SYS_PTRACE & 1
    return scope if scope > 2 or (scope == 2 and not privileged) else 0


def _kernel() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", platform.release())[:2]))


def _without_sandbox(failure: Failure) -> Problem | None:
    return Problem(
        "this QEMU was built without seccomp, and so without its sandbox",
        f"Install a QEMU that was built with seccomp. {how_to_install([QEMU])}.",
    )


def _executable_memory(failure: Failure) -> Problem | None:
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
        return None
    except OSError as error:
        refusal = error.strerror
    import ctypes

    where = "systemd: MemoryDenyWriteExecute=no"
    if ctypes.CDLL(None).prctl(PR_GET_MDWE, 0, 0, 0, 0) <= 0 and _selinux():
        where = "SELinux: the permission execmem (setsebool deny_execmem off)"
    return Problem(
        "this host refuses memory that is writable and executable, which TCG (QEMU's software "
        f"emulation) needs for translated code ({refusal})",
        f"Allow such memory where it is forbidden: {where}. KVM does not need such memory.",
    )


def _address_family(failure: Failure) -> Problem | None:
    for family in (socket.AF_UNIX, socket.AF_INET):
        try:
            socket.socket(family).close()
        except OSError as error:
            return Problem(
                f"this host refuses sockets of the family {family.name} ({error.strerror})",
                FILTER.format(
                    "the socket families AF_UNIX and AF_INET",
                    "RestrictAddressFamilies=AF_UNIX AF_INET",
                ),
            )
    return None


def _loopback(failure: Failure) -> Problem | None:
    try:
        with socket.socket() as listener, socket.socket() as client:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect(listener.getsockname())
    except OSError as error:
        return Problem(
            f"127.0.0.1 cannot be used in this network namespace ({error.strerror})",
            "Set up its loopback interface: ip link set lo up.",
        )
    return None


def _memfd(failure: Failure) -> Problem | None:
    try:
        os.close(os.memfd_create("probe"))
    except OSError as error:
        return _refused("memfd_create", error.strerror)
    return None


def _prctl(failure: Failure) -> Problem | None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) >= 0:
        return None
    refusal = os.strerror(ctypes.get_errno())
    return _refused("prctl", refusal, ", with which processes ask to end with their owner")


# Files


def _hard_links(failure: Failure) -> Problem | None:
    from tempfile import TemporaryDirectory

    if (directory := _existing(failure)) is None:
        return None
    refusals = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP)
    try:
        with TemporaryDirectory(dir=directory) as name:
            Path(name, "file").touch()
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.link("file", "link", src_dir_fd=fd, dst_dir_fd=fd)  # linkat(2), as in a claim
            finally:
                os.close(fd)
    except OSError as error:
        if error.filename2 is None or error.errno not in refusals:
            return None  # not a refused link
        return Problem(
            f"hard links, with which a host claims a VM's directory, are refused on "
            f"{find_file_system(directory).name} ({error.strerror})",
            "Pass a data_dir= on a file system with hard links, or allow link(2) and linkat(2).",
        )
    return None


def _lock(failure: Failure) -> Problem | None:
    with suppress(OSError):  # without a memfd, only the file system can be blamed
        fd = os.memfd_create("probe")
        try:
            if refusal := _refusal_to_lock(fd):
                return _refused("flock", refusal)
        finally:
            os.close(fd)
    if (existing := _existing(failure)) is None:
        return None
    fd = os.open(existing, os.O_RDONLY | os.O_CLOEXEC)
    try:
        refusal = _refusal_to_lock(fd)
    finally:
        os.close(fd)
    if not refusal:
        return None
    found = find_file_system(existing)
    nfs = " or, on NFS, mount it with local_lock=flock" if found.kind.startswith("nfs") else ""
    return Problem(
        f"{found.name} does not support locks by flock(2) ({refusal})",
        f"Pass the path of a directory on a local disk as data_dir={nfs}.",
    )


def _existing(failure: Failure) -> Path | None:
    """Return the directory of the failure, or its first parent that exists."""
    places = () if failure.path is None else (failure.path, *failure.path.parents)
    return next((path for path in places if path.is_dir()), None)


def _refusal_to_lock(fd: int) -> str:
    """Return the reason why a file or directory cannot be locked; empty if it can be."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # another process has locked it
        return ""
    except OSError as error:
        return str(error.strerror)
    return ""


def _full(failure: Failure) -> Problem | None:
    if failure.path is None:
        return None
    found = find_file_system(failure.path)
    if found.free is None or found.free >= MIB:
        return None
    return Problem(
        f"{found} is full", f"Free some space on {found.mount}, or pass another data_dir=."
    )


def _read_only(failure: Failure) -> Problem | None:
    if failure.path is None:
        return None
    found = find_file_system(failure.path)
    return Problem(
        f"{found.name} is read-only",
        "Pass a directory on a writable file system as data_dir=, or make it writable: a "
        "container: docker run --volume or --tmpfs; systemd: ReadWritePaths= or StateDirectory=.",
    )


def find_noexec(program: str, search_path: str) -> Problem | None:
    """Return the problem if a program is in the search path, but its file system forbids it."""
    for directory in search_path.split(os.pathsep):
        path = Path(directory, program)
        if path.is_file() and "noexec" in (found := find_file_system(path)).options:
            return Problem(
                f"{path} cannot be executed: {found.name} is mounted with noexec",
                f"Install the program elsewhere, or mount -o remount,exec {found.mount}.",
            )
    return None


def _not_executable(failure: Failure) -> Problem | None:
    for path in re.findall(r"exec: (/[^:\n]+): Permission denied", failure.text):
        if (problem := find_noexec(Path(path).name, str(Path(path).parent))) is not None:
            return problem
    return None


def _security_module(failure: Failure) -> Problem | None:
    named = re.findall(r"open '?([^'\n]+?)'?: Permission denied", failure.text)
    if not any(os.access(failure.path / name if failure.path else name, os.R_OK) for name in named):
        return None  # the modes of the file refuse it
    if _selinux():
        return Problem(
            "SELinux denies the access, although this user may read the file",
            "See the denial: ausearch -m avc -ts recent. Label the file, or change the policy.",
        )
    if Path("/sys/module/apparmor/parameters/enabled").exists():
        return Problem(
            "AppArmor denies the access, although this user may read the file",
            "See the denial: journalctl -k | grep DENIED; then change the profile that it names.",
        )
    return None


def _selinux() -> bool:
    with suppress(OSError):
        return Path("/sys/fs/selinux/enforce").read_text().strip() == "1"
    return False


def _no_proc(failure: Failure) -> Problem | None:
    if Path("/proc/self/fd").is_dir():
        return None
    return Problem(
        "/proc is not mounted here, and this library and QEMU need it",
        "Mount it: mount -t proc proc /proc; systemd: ProcSubset=all, and no InaccessiblePaths=.",
    )


def _library(failure: Failure) -> Problem | None:
    return Problem(
        "a shared library of the program is missing",
        "Reinstall the program with its dependencies, from one distribution.",
    )


# Limits


def _limit(name: str, option: str) -> Callable[[Failure], Problem | None]:
    """Return a row's function for a resource limit; `option` is the option of `ulimit`."""

    def find(failure: Failure) -> Problem | None:
        soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        if soft == resource.RLIM_INFINITY:
            return None
        most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard}"
        return Problem(
            f"the resource limit RLIMIT_{name} of this process is {soft} (at most {most})",
            f"Raise the limit: ulimit -{option}; systemd: Limit{name}=; "
            f"docker run --ulimit {name.lower()}=NUMBER.",
        )

    return find


def _tasks(failure: Failure) -> Problem | None:
    """Look for a cgroup that may not have more processes and threads."""
    lines = []
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for cgroup in (Path(path), *Path(path).parents):
            root = Path("/sys/fs/cgroup", "pids" if "pids" in controllers else "")
            directory = root / str(cgroup).lstrip("/")
            with suppress(OSError, ValueError):  # without a limit, pids.max is `max`
                most = int((directory / "pids.max").read_text())
                now = int((directory / "pids.current").read_text())
                if now > most - FEW:
                    return Problem(
                        f"the cgroup {cgroup} has {now} of at most {most} processes and threads",
                        "Raise the limit: systemd: TasksMax=; docker run --pids-limit.",
                    )
    return None


def _own_tasks(failure: Failure) -> Problem | None:
    """Compare the number of this user's threads with the limit, which root does not have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft == resource.RLIM_INFINITY or os.geteuid() == 0:
        return None
    threads = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            if process.stat().st_uid == os.geteuid():
                threads += len(os.listdir(process / "task"))
    return _limit("NPROC", "u")(failure) if threads > soft - FEW else None


def _overcommit(failure: Failure) -> Problem | None:
    with suppress(OSError):
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return Problem(
                "this host promises no more memory than it has (vm.overcommit_memory=2)",
                "Pass a smaller memory=, or set it: sudo sysctl vm.overcommit_memory=0.",
            )
    return None


FEW = 32  # threads; QEMU has about 10

NO_MEMORY = r"(?i)(cannot|failed to) allocate|not enough memory|out of memory|failed to map segment"
NO_PROCESS = r"Resource temporarily unavailable|thread_create|can't start new thread"
DIED_SILENTLY = r"killed by SIG(ABRT|SEGV|TRAP)\.\nLog:\n\(empty\)"
# A thread needs memory for its stack; not every program checks that it has got memory.
NO_ADDRESSES = f"{NO_MEMORY}|{NO_PROCESS}|{DIED_SILENTLY}"
REFUSED_CALL = r"Operation not permitted|Function not implemented|Operation not supported"
REFUSED = r".*(?:Permission denied|not permitted)"

CAUSES = (
    Cause("SIGSYS", _killed),
    Cause("/proc/", _no_proc),
    Cause("option group 'sandbox'|seccomp", _seccomp),
    Cause("option group 'sandbox'", _without_sandbox),
    Cause("(mprotect|jit buffer|translator buffer|code_gen_buffer)" + REFUSED, _executable_memory),
    Cause("Address family not supported|host forwarding rule", _address_family),
    Cause("host forwarding rule|Cannot assign requested address", _loopback),
    Cause("memfd_create", _memfd),
    # The message does not name the system call that was refused.
    Cause(REFUSED_CALL, _prctl),
    Cause(REFUSED_CALL, _memfd),
    Cause(REFUSED_CALL, _address_family),
    Cause(REFUSED_CALL, _hard_links),
    Cause("flock", _lock),
    Cause("No space left on device", _full),
    Cause("Read-only file system", _read_only),
    Cause("cannot open shared object file", _library),
    Cause("Permission denied", _not_executable),
    Cause("Could not open.*Permission denied", _security_module),
    Cause("Too many open files(?! in system)", _limit("NOFILE", "n")),
    Cause(NO_PROCESS, _tasks),
    Cause(NO_PROCESS, _own_tasks),
    Cause(NO_ADDRESSES, _limit("AS", "v")),
    Cause(NO_ADDRESSES, _limit("DATA", "d")),
    Cause(NO_MEMORY, _overcommit),
    Cause("File too large|SIGXFSZ", _limit("FSIZE", "f")),
    Cause("SIGXCPU|killed by SIGKILL", _limit("CPU", "t")),
)
