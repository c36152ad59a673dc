"""Restrictions of a container, a service or a mount: errors name the restriction and its place."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, LaunchError
from smolvm_async.host.restrictions import find_cause
from smolvm_async.images.build.debian import DebianImage
from tests import restricted
from tests.conftest import FakeProgram

START = """
import asyncio, json, sys
from smolvm_async import AsyncSmolVM, SmolVMError

async def main(data_dir, image, os):
    try:
        vm = AsyncSmolVM(os=os, image=image, accel="tcg", memory=2048, data_dir=data_dir)
        await vm.start()
    except SmolVMError as error:
        return error.to_json()
    await vm.delete()

print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
"""


def under(restrictions: list[str], *command: str) -> list[str]:
    """Return the command line that runs a Python program under restrictions."""
    return [sys.executable, restricted.__file__, *restrictions, "--", sys.executable, *command]


def start(prefix: list[str], data_dir: Path, image: Path, os: str = "windows") -> Any:
    """Start a VM with a command line that ends with Python; return an error's fields, or `None`."""
    words = [*prefix, "-c", START, str(data_dir), str(image), os]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    error = json.loads(done.stdout)
    return error


@pytest.mark.parametrize(
    ("restriction", "os", "reason", "where"),
    [
        ("seccomp=EPERM", "windows", "refuses the system call seccomp(2)", "SystemCallFilter="),
        ("seccomp=ENOSYS", "linux", "refuses the system call seccomp(2)", "--security-opt seccomp"),
        ("seccomp=KILL", "windows", "a seccomp filter", "SystemCallFilter="),
        ("mdwe", "windows", "writable and executable", "MemoryDenyWriteExecute=no"),
        ("socket:AF_INET=EAFNOSUPPORT", "linux", "AF_INET", "RestrictAddressFamilies="),
        ("socket:AF_UNIX=EAFNOSUPPORT", "linux", "AF_UNIX", "RestrictAddressFamilies="),
        ("flock=ENOLCK", "windows", "refuses the system call flock(2)", "SystemCallFilter="),
        ("flock=EBADF", "linux", "refuses the system call flock(2)", "SystemCallFilter="),
        ("memfd_create=EPERM", "linux", "refuses the system call memfd_create(2)", "seccomp"),
        ("linkat=EPERM", "windows", "hard links", "data_dir="),
        ("prctl=EPERM", "windows", "refuses the system call prctl(2)", "seccomp"),
        ("pidfd_open=EPERM", "windows", "refuses pidfd_open(2)", "seccomp"),
        ("pidfd_open=ENOSYS", "linux", "refuses pidfd_open(2)", "Linux 5.3"),
        ("RLIMIT_AS=3000000000", "linux", "RLIMIT_AS of this process is 3000000000", "LimitAS="),
        ("RLIMIT_NOFILE=13", "linux", "RLIMIT_NOFILE of this process is 13", "ulimit -n"),
    ],
)
def test_a_start_names_the_restriction_and_where_it_is_set_and_leaves_nothing(
    blank_image: Path, data_dir: Path, restriction: str, os: str, reason: str, where: str
) -> None:
    error = start(under([restriction]), data_dir, blank_image, os)
    assert reason in error["message"]
    assert where in error["hint"]
    assert not data_dir.exists() or not list(data_dir.iterdir())


@pytest.mark.parametrize(
    ("restriction", "check", "reason", "where"),
    [
        ("seccomp=EPERM", "boot", "refuses the system call seccomp(2)", "--security-opt seccomp"),
        ("mdwe", "boot", "writable and executable", "MemoryDenyWriteExecute=no"),
        ("flock=ENOLCK", "data-dir", "refuses the system call flock(2)", "SystemCallFilter="),
        ("memfd_create=ENOSYS", "system-calls", "memfd_create(2)", "SystemCallFilter="),
        ("socket:AF_INET=EPERM", "system-calls", "AF_INET", "RestrictAddressFamilies="),
    ],
)
def test_the_doctor_names_the_restriction_and_where_it_is_set(
    data_dir: Path, restriction: str, check: str, reason: str, where: str
) -> None:
    doctor = ["-m", "smolvm_async", "doctor", "--json", "--accel", "tcg"]
    words = under([restriction], *doctor, "--data-dir", str(data_dir))
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    found = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    assert found[check]["status"] == "failed"
    assert reason in found[check]["detail"]
    assert where in found[check]["cure"]


def test_a_port_that_cannot_be_forwarded_names_the_restriction(
    blank_image: Path, data_dir: Path
) -> None:
    expose = START.replace("await vm.start()", "await vm.start(); await vm.expose_local(80)")
    words = [*under(["socket:AF_INET=EAFNOSUPPORT"]), "-c", expose]
    done = subprocess.run(
        [*words, str(data_dir), str(blank_image), "windows"],
        check=False,
        capture_output=True,
        text=True,
    )
    error = json.loads(done.stdout)
    assert "refuses sockets of the family AF_INET" in error["message"]
    assert "RestrictAddressFamilies=" in error["hint"]
    assert "host_port=" not in error["hint"]


def test_a_vm_is_killed_and_reaped_without_newer_system_calls(
    blank_image: Path, data_dir: Path
) -> None:
    restrictions = ["pidfd_send_signal=EPERM", "waitid=EPERM"]
    assert start(under(restrictions), data_dir, blank_image) is None
    assert not list(data_dir.iterdir())


GUARD = """
import asyncio, json, sys, warnings
from smolvm_async import AsyncSmolVM, HostError

async def main(data_dir, image):
    vms = {"accel": "tcg", "data_dir": data_dir}
    blank = {**vms, "os": "windows", "image": image, "memory": 2048}
    result = {}
    try:
        await AsyncSmolVM(**vms, internet_settings={"mode": "restricted"}).start()
    except HostError as error:
        result["restricted"] = str(error)
    if sys.argv[3:]:
        return result
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with AsyncSmolVM(**blank) as vm:
            try:
                await vm.set_internet_settings({"mode": "off"})
            except HostError as error:
                result["change"] = str(error)
            result["open"] = vm.internet_settings.mode
        result["warnings"] = [f"{each.category.__name__}: {each.message}" for each in caught]
    served = []
    server = await asyncio.start_server(lambda _, writer: served.append(1), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with AsyncSmolVM(**vms, internet_settings={"mode": "off"}) as vm:
            reach = f"timeout 5 bash -c '</dev/tcp/10.0.2.2/{port}' || echo no"
            result["off"] = (await vm.run(reach)).stdout.strip()
    result["silent"] = not caught
    result["served"] = served
    server.close()
    return result

print(json.dumps(asyncio.run(main(*sys.argv[1:3]))))
"""


def guard(restriction: str, data_dir: Path, image: Path, *only: str) -> Any:
    words = [*under([restriction]), "-c", GUARD, str(data_dir), str(image), *only]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("restriction", "told"),
    [
        ("seccomp=EPERM", "seccomp(2) (Operation not permitted)"),
        ("pidfd_getfd=ENOSYS", "pidfd_getfd(2)"),
        ("process_vm_readv=EPERM", "process_vm_readv(2)"),
        ("process_vm_readv=KILL", "process_vm_readv(2)"),
        ("listener", "already answers system calls"),
    ],
)
def test_a_host_that_cannot_guard_refuses_a_restricted_guest(
    data_dir: Path, blank_image: Path, restriction: str, told: str
) -> None:
    error = guard(restriction, data_dir, blank_image, "only restricted")["restricted"]
    assert told in error
    assert "mode='off'" in error
    assert not data_dir.exists() or not list(data_dir.iterdir())


@pytest.mark.anyio
async def test_without_a_guard_an_open_guest_warns_once_and_off_shuts_the_network(
    data_dir: Path, blank_image: Path, debian: DebianImage
) -> None:
    result = await asyncio.to_thread(guard, "pidfd_getfd=EPERM", data_dir, blank_image)
    for error in result["restricted"], result["change"]:
        assert "pidfd_getfd(2)" in error
        assert "seccomp" in error  # where to allow the call
    assert result["open"] == "open"
    (warning,) = result["warnings"]
    assert warning.startswith("NetworkWarning: The guest can reach this host's loopback")
    assert (result["off"], result["served"], result["silent"]) == ("no", [], True)


def in_mounts(script: str) -> list[str]:
    """Return a command line that changes the mounts of a new namespace, then runs Python."""
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user cannot make a mount namespace")
    return ["unshare", "-m", "sh", "-ec", f'{script}; exec "$0" "$@"', sys.executable]


def test_a_missing_proc_is_named(blank_image: Path, data_dir: Path) -> None:
    error = start(in_mounts("mount -t tmpfs none /proc"), data_dir, blank_image)
    assert "/proc is not mounted" in error["message"]
    assert "mount -t proc proc /proc" in error["hint"]
    assert not data_dir.exists()


def test_a_read_only_file_system_is_named(blank_image: Path, tmp_path: Path) -> None:
    script = f"mount -t tmpfs -o ro,mode=0700 none {tmp_path}"
    error = start(in_mounts(script), tmp_path / "vms", blank_image)
    assert f"the file system on {tmp_path} (tmpfs) is read-only" in error["message"]
    assert "ReadWritePaths=" in error["hint"]


def test_a_program_on_a_file_system_without_execution_is_named(
    blank_image: Path, tmp_path: Path
) -> None:
    copy = f"cp {shutil.which('qemu-system-x86_64')} {tmp_path}"
    script = f"mount -t tmpfs -o noexec,mode=0700 none {tmp_path}; {copy}; export PATH={tmp_path}"
    error = start(in_mounts(script), tmp_path / "vms", blank_image)
    assert f"{tmp_path}/qemu-system-x86_64 cannot be executed" in error["message"]
    assert f"mount -o remount,exec {tmp_path}" in error["hint"]


SYMPTOMS = (  # of QEMU 7.2 between 1.0 and 3.3 GB, by its memory and by chance
    "cannot set up guest memory 'pc.ram': Cannot allocate memory",
    "GLib: ../../../glib/gmem.c:136: failed to allocate 5 bytes",
    "qemu: qemu_thread_create: Resource temporarily unavailable",
    "QEMU ended: killed by SIGSEGV.\nLog:\n(empty)",
)


def test_each_symptom_of_too_little_address_space_names_the_limit() -> None:
    program = (
        "import sys; from smolvm_async.host.restrictions import find_cause; "
        "print(*(find_cause(text).reason for text in sys.argv[1:]), sep='\\n')"
    )
    words = under(["RLIMIT_AS=3000000000"], "-c", program, *SYMPTOMS)
    told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert told.count("RLIMIT_AS of this process is 3000000000") == len(SYMPTOMS)


async def run_to_launch_error(arguments: dict[str, Any]) -> LaunchError:
    with pytest.raises(LaunchError) as raised:
        await AsyncSmolVM(**arguments).start()
    return raised.value


@pytest.mark.anyio
async def test_an_unknown_failure_is_told_in_the_words_of_the_system_without_a_cure(
    fake: FakeProgram, blank: dict[str, Any]
) -> None:
    fake("qemu-system-x86_64", "echo 'the flux capacitor is empty: Invalid argument' >&2; exit 3")
    error = await run_to_launch_error(blank)
    assert "the flux capacitor is empty: Invalid argument" in str(error)
    assert error.hint == ""


@pytest.mark.anyio
async def test_an_image_that_another_program_writes_has_a_hint(
    fake: FakeProgram, blank: dict[str, Any]
) -> None:
    fake("qemu-system-x86_64", "echo 'Failed to get shared \"write\" lock' >&2; exit 1")
    error = await run_to_launch_error(blank)
    assert f"Another program has {blank['image']} open for writing" in error.message
    assert "End that program" in error.hint


def test_a_restriction_that_the_host_does_not_have_is_not_blamed(tmp_path: Path) -> None:
    for text in (
        "There is no such thing as seccomp",
        "mprotect of jit buffer: Permission denied",
        "Address family not supported by protocol",
        "memfd_create(2) failed: Operation not permitted",
        "No such file or directory: '/proc/12/stat'",
        "No space left on device",
        "Could not open 'x': Permission denied",
        "flock(2) failed: No locks available",
        "Operation not permitted",
        *SYMPTOMS,
    ):
        assert find_cause(text, tmp_path) is None
