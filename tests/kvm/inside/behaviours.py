"""The library under a real KVM. These tests run in the host guest; test_kvm.py starts them there.

They run in this order, in one process. The last one may end the host guest itself.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from smolvm_async import AsyncSmolVM, Fleet, Reset, Rung, Status, VMCrashedError, VMTimeoutError
from smolvm_async.doctor import Outcome, examine, probe
from smolvm_async.guests.windows import HYPER_V

pytestmark = pytest.mark.anyio

STAND_IN = Path("/root/stand-in.qcow2")
HERE = Path(__file__).parent
DEVICE = Path("/dev/kvm")
NOBODY = 65534
BOOT = 240  # seconds; a boot takes 10 to 30


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
async def vm(data_dir: Path) -> AsyncIterator[AsyncSmolVM]:
    """The built-in Debian, made and started as a newcomer does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vm = AsyncSmolVM(vm_id="kept", keep=True, data_dir=data_dir)
    await vm.start()
    await vm.wait_for("ready", timeout=BOOT)
    yield vm
    await vm.delete()


@contextmanager
def careful_qemu() -> Iterator[None]:
    """Put a script before QEMU that spares the host guest the abort of its TCG (see the script)."""
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{HERE / 'bin'}:{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def qemu_of(vm: AsyncSmolVM, data_dir: Path) -> int:
    """Return the process id of the VM's QEMU."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            name, directory = (entry / "comm").read_text(), (entry / "cwd").readlink()
            if name.startswith("qemu") and directory == data_dir / vm.vm_id:
                return int(entry.name)
    raise AssertionError("QEMU does not run")


def options_of(vm: AsyncSmolVM, data_dir: Path) -> dict[str, str]:
    """Return QEMU's options by name; of a repeated option, the last value."""
    words = Path(f"/proc/{qemu_of(vm, data_dir)}/cmdline").read_text().split("\0")
    return dict(pairwise(words))


async def test_the_doctor_finds_kvm_smm_secure_boot_and_tpm_in_order(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(probe.BOOT, "kvm", BOOT)  # a real processor is many times faster
    with careful_qemu():
        report = await examine(data_dir=data_dir)
    found = {finding.check: finding for finding in report.findings}
    print(*report.findings, sep="\n")
    assert found.pop("disk").status is not Outcome.FAILED  # the host guest's disk is small
    assert {name: one for name, one in found.items() if one.status is not Outcome.OK} == {}
    assert found.keys() >= {"kvm", "accelerator", "boot", "smm", "secure-boot", "tpm"}
    assert "under KVM" in found["boot"].detail
    assert "selects KVM on this host, and KVM works" in found["accelerator"].detail


async def test_auto_takes_kvm_without_a_warning(vm: AsyncSmolVM, data_dir: Path) -> None:
    options = options_of(vm, data_dir)
    assert (options["-accel"], options["-cpu"]) == ("kvm", "host")
    assert "irqchip" not in options["-machine"]
    clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    assert (await vm.run(f"cat {clock}", check=True)).stdout == "kvm-clock\n"
    flags = (await vm.run("grep ^flags /proc/cpuinfo", check=True)).stdout.split()
    assert "svm" in Path("/proc/cpuinfo").read_text()
    assert {"hypervisor", "nx", "rdrand"} <= set(flags)


async def test_commands_run(vm: AsyncSmolVM) -> None:
    result = await vm.run("echo out; echo err >&2; exit 3", env={"A": "1"})
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)
    assert (await vm.run("python3 -c 'print(6 * 7)'", check=True)).stdout == "42\n"
    numbers = await asyncio.gather(*(vm.run(f"echo {number}") for number in range(10)))
    assert [one.stdout for one in numbers] == [f"{number}\n" for number in range(10)]


async def test_files_arrive_and_come_back(vm: AsyncSmolVM, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    sent.write_bytes(os.urandom(1 << 20))
    await vm.upload_file(sent, "/root/sent")
    came = await vm.download_file("/root/sent", tmp_path / "came")
    assert came.read_bytes() == sent.read_bytes()


async def test_the_screen_is_seen(vm: AsyncSmolVM) -> None:
    picture = await vm.screenshot()
    assert min(picture.size) >= 400
    assert picture.png.startswith(b"\x89PNG")


async def despite_resets(
    behaviour: Callable[[AsyncSmolVM], Awaitable[None]], vm: AsyncSmolVM
) -> None:
    """Start again, at most twice, if QEMU reports a reset by the guest.

    This happens under TCG's SVM now and then, just after QEMU's RESUME. A reset that the library
    asked QEMU for would have another cause, and fails the test.
    """
    for repeats_left in (2, 1, 0):
        events = vm.events()
        try:
            return await behaviour(vm)
        except Exception as error:
            resets = [one for one in events.pending() if isinstance(one, Reset)]
            if not (repeats_left and resets and all(one.guest for one in resets)):
                raise
            print(f"the guest was reset ({resets[0]}): {error!r}")
            await vm.wait_for("ready", timeout=BOOT)


async def test_a_paused_guest_goes_on(vm: AsyncSmolVM) -> None:
    await despite_resets(pause_a_guest_that_counts, vm)


async def pause_a_guest_that_counts(vm: AsyncSmolVM) -> None:
    counting = "(while echo >>/run/beats; do sleep 0.1; done) </dev/null >/dev/null 2>&1 &"
    await vm.run(f"{counting} until [ -e /run/beats ]; do sleep 0.1; done", check=True)
    await vm.pause()
    assert str(vm.status) == "paused"
    await vm.resume()
    assert str(vm.status) == "running"
    first = await beats(vm)
    async with asyncio.timeout(BOOT):
        while await beats(vm) == first:
            pass


async def beats(vm: AsyncSmolVM) -> int:
    return int((await vm.run("wc -l </run/beats", check=True)).stdout)


WRITING = """
until [ -e /run/over ]; do
    head -c 16K /dev/urandom >/run/a
    cat /run/a >/run/b
    cmp /run/a /run/b >>/run/differences 2>&1
    echo >>/run/rounds
    sleep 0.5
done
"""
OOPS = 1 << 7  # in the kernel's taint mask


async def test_a_guest_that_writes_goes_on_in_a_snapshot_and_in_a_fork(
    vm: AsyncSmolVM, data_dir: Path
) -> None:
    """The memory is sent while the guest runs and changes it."""
    await despite_resets(partial(save_a_guest_that_writes, data_dir), vm)


async def save_a_guest_that_writes(data_dir: Path, vm: AsyncSmolVM) -> None:
    start = f"echo A >/root/state; : >/run/differences; ({WRITING}) </dev/null >/dev/null 2>&1 &"
    await vm.run(f"{start} until [ -s /run/rounds ]; do sleep 0.1; done", check=True, timeout=BOOT)
    await vm.snapshot("one")
    try:
        await vm.run("echo B >/root/state", check=True, timeout=BOOT)
        await two_clones_go_on(data_dir, vm)
        await goes_on_in_state("B", vm)
    finally:
        await AsyncSmolVM.delete_snapshot("one", data_dir=data_dir)
    await vm.run("touch /run/over", check=True, timeout=BOOT)


async def two_clones_go_on(data_dir: Path, vm: AsyncSmolVM) -> None:
    timeouts = {"launch": BOOT, "boot": BOOT}
    # One clone at a time: the guests share two slow processors.
    async with AsyncSmolVM.from_snapshot("one", data_dir=data_dir, timeouts=timeouts) as restored:
        await goes_on_in_state("A", restored)
        await restored.stop(timeout=0)
    async with vm.fork(1, timeouts=timeouts) as (forked,):
        await goes_on_in_state("B", forked)
        await forked.stop(timeout=0)


async def goes_on_in_state(state: str, vm: AsyncSmolVM) -> None:
    """Check that the guest goes on to write, has the state, and that its memory is in order."""
    rounds = "wc -l </run/rounds"
    # After a reset of the guest, the file is gone.
    more = f"n=$({rounds}) || exit; until [ $({rounds}) -gt $((n + 1)) ]; do sleep 1; done"
    oops = f"echo $(($(cat /proc/sys/kernel/tainted) & {OOPS}))"
    look = f"{more}; cat /root/state /run/differences; {oops}; dmesg | grep -c 'segfault at'"
    assert (await vm.run(look, timeout=BOOT)).stdout == f"{state}\n0\n0\n"


async def test_a_kept_vm_powers_down_and_starts_again(vm: AsyncSmolVM, data_dir: Path) -> None:
    await vm.run("echo precious >/root/note", check=True, timeout=BOOT)
    report = await vm.stop()
    assert (report.rung, report.graceful) == (Rung.POWERDOWN, True), report
    again = await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir)
    async with again:
        assert (await again.run("cat /root/note", timeout=BOOT)).stdout == "precious\n"
        assert options_of(again, data_dir)["-accel"] == "kvm"
        assert (await again.stop()).graceful


async def test_a_fleet_of_three_answers(data_dir: Path) -> None:
    async def job(vm: AsyncSmolVM, word: str) -> tuple[str, str]:
        accelerator = options_of(vm, data_dir)["-accel"]
        return str((await vm.run(f"echo {word}", timeout=BOOT)).stdout), accelerator

    # Three QEMUs at once start slowly here, and 30 s are too few if the host is busy.
    timeouts = {"launch": BOOT}
    async with Fleet(
        {"memory": 256, "data_dir": data_dir, "timeouts": timeouts}, max_live=3
    ) as fleet:
        results = [result async for result in fleet.map(job, ["a", "b", "c"])]
    assert sorted(results) == [("a\n", "kvm"), ("b\n", "kvm"), ("c\n", "kvm")]


async def test_a_qemu_that_is_killed_is_a_crash(data_dir: Path) -> None:
    with pytest.raises(VMCrashedError, match="killed by SIGKILL"):
        async with AsyncSmolVM(data_dir=data_dir) as vm:
            os.kill(qemu_of(vm, data_dir), signal.SIGKILL)
            await asyncio.sleep(BOOT)
    assert vm.status is Status.DELETED


async def test_a_guest_that_panics_is_a_crash(data_dir: Path) -> None:
    with pytest.raises(VMCrashedError, match="panicked"):
        async with AsyncSmolVM(data_dir=data_dir) as vm:
            await vm.run("echo c >/proc/sysrq-trigger", timeout=BOOT)
            await asyncio.sleep(BOOT)
    assert vm.status is Status.DELETED


# Another user tries both; the process prints the error and the warning.
REFUSED = """
import sys, warnings
from smolvm_async import AsyncSmolVM, HostError

try:
    AsyncSmolVM(os="linux", image=sys.argv[1], accel="kvm", data_dir=sys.argv[2])
except HostError as error:
    print(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    AsyncSmolVM(os="linux", image=sys.argv[1], data_dir=sys.argv[2])
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")
"""


def refused(tmp_path: Path, uid: int = 0) -> tuple[str, str]:
    """Return the error of accel='kvm' and the warning of accel='auto' in a process of a user."""
    image = tmp_path / "blank.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    os.chown(tmp_path, uid, uid)
    user = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    command = (
        *user,
        "env",
        f"HOME={tmp_path}",
        sys.executable,
        "-c",
        REFUSED,
        str(image),
        str(tmp_path / "data"),
    )
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    error, warning = printed.rstrip("\n").split("AcceleratorWarning: ")
    return error, warning


def test_without_permission_kvm_fails_with_the_cure(tmp_path: Path) -> None:
    DEVICE.chmod(0o600)
    error, warning = refused(tmp_path, NOBODY)
    for text in (error, warning):
        assert "this user may not open /dev/kvm" in text
        assert "sudo usermod -aG kvm $USER" in text
    assert "accel='tcg'" in error
    assert "under TCG" in warning


def test_without_the_device_kvm_fails_with_the_cure(tmp_path: Path) -> None:
    away = DEVICE.with_name("kvm.away")
    DEVICE.rename(away)
    try:
        error, warning = refused(tmp_path)
    finally:
        away.rename(DEVICE)
    for text in (error, warning):
        assert "/dev/kvm does not exist here, although this kernel has loaded KVM" in text
        assert "--device /dev/kvm" in text


async def test_the_windows_class_boots_with_secure_boot_and_a_tpm(data_dir: Path) -> None:
    with careful_qemu():
        vm = AsyncSmolVM(os="windows", image=STAND_IN, cpus=1, memory=2048, data_dir=data_dir)
    async with vm:
        try:
            await vm.wait_for("ready", timeout=BOOT / 2)
        except VMTimeoutError as error:  # under the emulated KVM, GRUB hangs now and then
            print("The first boot hung:", error)
            await vm.stop(timeout=0)
            await vm.start()
            await vm.wait_for("ready", timeout=BOOT / 2)
        async with asyncio.timeout(BOOT):
            while "STAND-IN: ready" not in vm.console_log():
                await asyncio.sleep(0.1)
        options = options_of(vm, data_dir)
        report = await vm.stop()
    reported = dict(re.findall(r"STAND-IN: (\w+)=(\S+)", vm.console_log()))
    assert options["-accel"] == "kvm"
    assert reported["secure_boot"] == "1"
    assert reported["setup_mode"] == "0"
    assert reported["tpm_version"] == "2"
    assert re.fullmatch(r"[0-9a-f]{16}", reported["tpm_random"])
    assert reported["root_driver"] == "virtio_scsi"
    assert (report.rung, report.graceful) == (Rung.POWERDOWN, True), report


async def test_kvm_takes_every_hyper_v_enlightenment(data_dir: Path) -> None:
    """Start the command line of users until the processors run; the host guest may end soon."""
    assert shutil.which("qemu-system-x86_64") == "/usr/bin/qemu-system-x86_64"
    vm = AsyncSmolVM(os="windows", image=STAND_IN, data_dir=data_dir)
    await vm.start()
    options = options_of(vm, data_dir)
    assert vm.status is Status.RUNNING
    await vm.delete()
    assert options["-cpu"] == ",".join(("host", *HYPER_V))
    assert options["-smp"].startswith("sockets=1,cores=2")
    assert "irqchip" not in options["-machine"]
