"""Attacks by another user of this machine, by a hostile guest, and by planted files."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolvm_async import (
    AsyncSmolVM,
    BootState,
    ConfigError,
    GuestAgentError,
    LaunchError,
    Rung,
    Status,
    VMNotFoundError,
)
from smolvm_async.images.build.debian import DebianImage
from tests.conftest import BOOT, FakeProgram, children, run_of, vm_in

pytestmark = pytest.mark.anyio

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user as well")


# Another user of this machine


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user can reach."""
    place = Path("/tmp") / f"smolvm-async-test-{os.getpid()}"
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    yield place
    assert {entry.name for entry in place.iterdir()} <= {"data"}
    shutil.rmtree(place)


AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")


def python_of_nobody() -> str:
    """A Python that the other user can run: this one may be in a home directory."""
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*AS_NOBODY, python, "-I", "-c", ""]
        if subprocess.run(command, stderr=subprocess.DEVNULL, cwd="/").returncode == 0:
            return python
    pytest.skip("no Python that another user can run")


ATTACK = """
import os, socket, sys
found = []
directory, *pids = sys.argv[1:]

def attempt(what, act):
    try:
        act()
        found.append(what)
    except OSError as error:
        assert error.errno in (1, 13), (what, error)

def connect():
    socket.socket(socket.AF_UNIX).connect(directory + "/control.sock")

attempt("list", lambda: os.listdir(directory))
attempt("enter", lambda: os.chdir(directory))
attempt("connect", connect)
for name in ("vm.json", "vars.fd", "overlay.qcow2", "qemu.log", "tpm", "tpm/tpm2-00.permall"):
    attempt(name, lambda: os.open(directory + "/" + name, os.O_RDONLY))
    attempt(name, lambda: os.unlink(directory + "/" + name))
attempt("plant", lambda: os.open(directory + "/x", os.O_CREAT | os.O_WRONLY))
attempt("rename", lambda: os.rename(directory, directory + "2"))
for pid in pids:
    attempt("kill", lambda: os.kill(int(pid), 9))
    attempt("memory", lambda: os.open(f"/proc/{pid}/mem", os.O_RDWR))
    attempt("environment", lambda: os.open(f"/proc/{pid}/environ", os.O_RDONLY))
print(found)
"""


@as_root
async def test_another_user_gets_nothing(blank_image: Path, open_place: Path) -> None:
    data_dir = open_place / "data"
    async with vm_in(data_dir, blank_image, vm_id="secret") as vm:
        pids = [str(pid) for pid in children()]
        listening = listening_ports(int(pid) for pid in pids)
        attack = await asyncio.create_subprocess_exec(
            *(*AS_NOBODY, python_of_nobody(), "-I", "-c", ATTACK),
            *(str(data_dir / "secret"), *pids),
            stdout=subprocess.PIPE,
            cwd="/",
        )
        assert (await attack.communicate())[0] == b"[]\n"
        for path in (data_dir / "secret").rglob("*"):
            assert path.lstat().st_mode & 0o077 == 0, path
        assert listening == []
        assert vm.status is Status.RUNNING


def listening_ports(pids: Iterator[int]) -> list[str]:
    """The TCP and UDP sockets of these processes."""
    inodes = {
        os.readlink(link)
        for pid in pids
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(link).startswith("socket:")
    }
    return [
        line
        for table in ("tcp", "tcp6", "udp", "udp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if f"socket:[{line.split()[9]}]" in inodes
    ]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o720])
def test_a_data_dir_that_others_can_write_to_is_refused(
    blank_image: Path, tmp_path: Path, mode: int
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    data_dir.chmod(mode)
    with pytest.raises(ConfigError, match="chmod go-w"):
        vm_in(data_dir, blank_image)
    for look in (AsyncSmolVM.list, AsyncSmolVM.prune):
        with pytest.raises(ConfigError, match="chmod go-w"):
            asyncio.run(look(data_dir=data_dir))
    data_dir.chmod(0o755)
    vm_in(data_dir, blank_image)


@as_root
async def test_a_data_dir_of_another_user_is_refused(blank_image: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o755)
    os.chown(data_dir, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match="belongs to another user"):
        vm_in(data_dir, blank_image)


async def test_a_vms_processes_get_none_of_the_owners_secrets(
    blank_image: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    async with vm_in(data_dir, blank_image):
        for pid in children():
            assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()


# Planted files


async def test_a_planted_link_is_not_followed(
    blank_image: Path, data_dir: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    data_dir.mkdir(mode=0o700)
    (data_dir / "planted").symlink_to(victim)
    with pytest.raises(ConfigError, match="cannot be used"):
        await vm_in(data_dir, blank_image, vm_id="planted").start()
    with pytest.raises(VMNotFoundError):
        await AsyncSmolVM.from_id("planted", data_dir=data_dir)
    assert await AsyncSmolVM.list(data_dir=data_dir) == []
    assert await AsyncSmolVM.prune(data_dir=data_dir) == []
    assert (victim / "thesis.tex").exists()
    (data_dir / "planted").unlink()


LOOSE = ("qemu.log", "vm.json.new")


@pytest.mark.parametrize("name", ["overlay.qcow2", "vars.fd", "tpm", *LOOSE])
async def test_what_an_orphan_points_to_is_neither_written_nor_removed(
    blank_image: Path, data_dir: Path, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    vm = vm_in(data_dir, blank_image, vm_id="planted", keep=True)
    async with vm:
        pass
    planted = data_dir / "planted" / name
    if planted.is_dir():
        shutil.rmtree(planted)
    planted.unlink(missing_ok=True)
    planted.symlink_to(victim)
    with pytest.raises(LaunchError if name in LOOSE else ConfigError, match=name):
        await vm.start()
    assert victim.read_text() == "years of work"
    await vm.delete()
    assert victim.read_text() == "years of work"


GOOD_RECORD = {
    "schema_version": 1,
    "config": {
        "os": "windows",
        "image": "/x.qcow2",
        "memory": 2048,
        "cpus": 2,
        "vm_id": "strange",
        "accel": "tcg",
        "keep": False,
        "limits": {},
        "timeouts": {},
        "data_dir": "/x",
    },
    "created": 1,
    "owner": [4000000, 1],  # long dead
}
RECORDS = [
    b"",
    b"null",
    b"[1]",
    b"{}",
    b'{"schema_version": 2}',
    b'{"schema_version": 1, "config": {}}',
    b"[" * 100_000,
    b'{"schema_version": 1, "config": {"vm_id": "../../etc"}, "created": 1}',
    *(
        json.dumps({**GOOD_RECORD, **change}).encode()
        for change in (
            {"created": 10**400},
            {"created": -(10**400)},
            {"processes": {"QEMU": [10**30, 1]}},
            {"processes": {"QEMU": [-1, 1]}},
            {"processes": {"QEMU": [0, 1]}},
        )
    ),
]


@pytest.mark.parametrize("content", RECORDS, ids=range(len(RECORDS)))
async def test_a_record_that_is_none_is_told_and_touched_by_nobody(
    blank_image: Path, data_dir: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    directory = data_dir / "strange"
    directory.mkdir(parents=True, mode=0o700)
    data_dir.chmod(0o700)
    (directory / "vm.json").write_bytes(content)
    assert await AsyncSmolVM.list(data_dir=data_dir) == []
    assert await AsyncSmolVM.prune(data_dir=data_dir) == []
    assert "The VM's record" in caplog.text
    with pytest.raises(ConfigError, match=r"The VM's record .* cannot be read"):
        await AsyncSmolVM.from_id("strange", data_dir=data_dir)
    with pytest.raises(ConfigError, match=r"The VM's record .* cannot be read"):
        await vm_in(data_dir, blank_image, vm_id="strange").start()
    assert (directory / "vm.json").read_bytes() == content
    shutil.rmtree(directory)


async def test_the_record_that_the_others_are_made_of_is_a_good_one(data_dir: Path) -> None:
    directory = data_dir / "strange"
    directory.mkdir(parents=True, mode=0o700)
    data_dir.chmod(0o700)
    (directory / "vm.json").write_text(json.dumps(GOOD_RECORD))
    (info,) = await AsyncSmolVM.prune(data_dir=data_dir)
    assert (info.vm_id, info.status) == ("strange", "orphaned")


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
async def test_a_record_that_is_no_file_is_told_every_time(
    data_dir: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = data_dir / "strange" / "vm.json"
    record.parent.mkdir(parents=True, mode=0o700)
    data_dir.chmod(0o700)
    if kind == "directory":
        record.mkdir()
    elif kind == "fifo":
        os.mkfifo(record)
    else:
        record.symlink_to("/etc/passwd")
    for _ in range(3):
        assert await AsyncSmolVM.list(data_dir=data_dir) == []
        assert await AsyncSmolVM.prune(data_dir=data_dir) == []
        with pytest.raises(ConfigError, match=r"The VM's record .* cannot be read"):
            await AsyncSmolVM.from_id("strange", data_dir=data_dir)
    shutil.rmtree(record.parent)


async def test_a_record_cannot_lead_elsewhere(
    blank_image: Path, data_dir: Path, tmp_path: Path
) -> None:
    vm = vm_in(data_dir, blank_image, vm_id="moved", keep=True)
    async with vm:
        pass
    path = data_dir / "moved" / "vm.json"
    record = json.loads(path.read_text())
    record["config"] |= {"data_dir": str(tmp_path / "elsewhere"), "vm_id": "other"}
    path.write_text(json.dumps(record))
    again = await AsyncSmolVM.from_id("moved", data_dir=data_dir)
    assert again.vm_id == "moved"
    async with again:
        assert (data_dir / "moved" / "control.sock").exists()
    assert not (tmp_path / "elsewhere").exists()
    await again.delete()


# A hostile guest


async def test_a_flood_of_the_log_is_bounded_on_disk_and_in_memory(
    blank_image: Path, data_dir: Path, fake: FakeProgram
) -> None:
    """A guest can make QEMU complain without end; a wrapper does it faster."""
    flood = "(yes flood | head -c 50000000 >&2; echo done >&2) &"
    fake("qemu-system-x86_64", f'{flood} exec $REAL "$@"')
    async with vm_in(data_dir, blank_image) as vm:
        log = data_dir / vm.vm_id / "qemu.log"
        qemu_child = run_of(vm).processes.qemu
        async with asyncio.timeout(60):
            while not qemu_child.log.text().endswith("done\n"):
                assert log.stat().st_size <= 2 * 256 * 1024
                await asyncio.sleep(0.001)
        assert qemu_child.log.count >= 50_000_000
        assert len(qemu_child.log.text()) <= 256 * 1024
        assert log.read_text().endswith("done\n")


async def test_a_flood_of_events_is_bounded(blank_image: Path, data_dir: Path) -> None:
    async with vm_in(data_dir, blank_image) as vm:
        slow = vm.events()
        other = await AsyncSmolVM.from_id(vm.vm_id, data_dir=data_dir)
        monitor = run_of(vm)._monitor
        for _ in range(1500):
            await monitor.execute("system_reset")
        assert len(slow.pending()) == 1024  # the latest
        assert vm.boot_state is BootState.FIRMWARE
        assert other.boot_state is BootState.FIRMWARE
        assert (await vm.stop(timeout=0)).rung is Rung.QUIT


FLOOD = """
for port in /sys/class/virtio-ports/*; do
    read -r name <$port/name
    if [ $name = org.qemu.guest_agent.0 ]; then
        yes flood </dev/null >/dev/${port##*/} 2>&1 &
    fi
done
"""


async def test_a_flood_of_the_agents_channel_is_bounded(
    debian: DebianImage, data_dir: Path
) -> None:
    # The built-in Linux as an image of the user's: only such a guest may have an agent.
    async with AsyncSmolVM(
        os="linux",
        image=debian.disk,
        kernel=debian.kernel,
        initrd=debian.initrd,
        boot_args=debian.boot_args,
        accel="tcg",
        data_dir=data_dir,
    ) as vm:
        await vm.run(FLOOD, check=True, timeout=BOOT)
        before = owned_bytes(data_dir / vm.vm_id)
        with pytest.raises(GuestAgentError, match="writes without end"):
            await run_of(vm).peripherals.agent.execute("guest-ping")
        for _ in range(200):
            assert (await run_of(vm)._monitor.execute("query-status"))["running"]
        assert owned_bytes(data_dir / vm.vm_id) - before < 8 << 20
        assert (await vm.stop()).rung is Rung.POWERDOWN


def owned_bytes(directory: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))
