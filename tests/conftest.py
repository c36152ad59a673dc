"""Shared by the tests: asyncio, disks and VMs, fake programs, the proof that nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, Timeouts
from smolvm_async.images.build.debian import DebianImage, build_debian

FakeProgram = Callable[[str, str], None]

BOOT = 240  # seconds; a boot takes 12 to 40 here, under TCG
GONE = 5.0  # seconds for what was killed to be reaped by others
LONGEST = (  # the files whose single tests take longest
    *("test_debian13.py", "test_cloud_image.py", "test_main_job.py", "test_input.py"),
    *("test_internet.py", "test_snapshots.py", "test_soak.py", "test_stand_in.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no worker is busy long after the others have ended."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def blank_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty 10 GiB qcow2: enough for everything that needs no operating system."""
    path = tmp_path_factory.mktemp("images") / "blank.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "10G"], check=True)
    return path


@pytest.fixture
async def stand_in() -> Path:
    """The signed Linux disk that stands in for Windows; built once, then cached."""
    from stand_in import build_stand_in  # only pytest has `examples` in its path, not our programs

    return await build_stand_in()


@pytest.fixture
async def debian() -> DebianImage:
    """The built-in image; built once, which takes minutes, then cached."""
    return await build_debian()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory that must be empty at the end."""
    return tmp_path / "data"


@pytest.fixture
def blank(blank_image: Path, data_dir: Path) -> dict[str, Any]:
    """The arguments of a VM that boots nothing, and so starts and stops in a moment."""
    return {
        "os": "linux",
        "image": blank_image,
        "memory": 128,
        "accel": "tcg",
        "data_dir": data_dir,
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, which a test can fill."""
    path = tmp_path / "small"
    path.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs"]
    mounted = subprocess.run(["mount", *options, path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def fill_up(directory: Path) -> Path:
    """Fill the file system of `directory` with a file, and return the path of that file."""
    filler = directory / "filler"
    with filler.open("wb") as file:
        while (space := os.fstatvfs(file.fileno())).f_bavail:
            with contextlib.suppress(OSError):  # another process took some of it
                size = os.fstat(file.fileno()).st_size
                os.posix_fallocate(file.fileno(), size, space.f_bavail * space.f_frsize)
    return filler


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of faults that the tests injected, and of the lines that they struck."""
    injected: Counter[str] = Counter()
    lines: set[str] = set()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, value in report.user_properties:
                    if name == "injected":
                        injected[value[0]] += value[1]
                    elif name == "injected at":
                        lines.update(value)
    if injected:
        terminalreporter.section("injected faults")
        for kind, count in sorted(injected.items()):
            terminalreporter.line(f"{count:6}  {kind}")
        terminalreporter.line(
            f"{injected.total():6}  in all, at {len(lines)} different lines of the library"
        )


def vm_in(data_dir: Path, image: Path, **options: Any) -> AsyncSmolVM:
    """A VM on `image`, under TCG, as small as can be unless `options` say otherwise.

    With its two default cores, a stand-in takes twice the processor time to boot.
    """
    settings = {"memory": 2048, "cpus": 1, "accel": "tcg", **options}
    return AsyncSmolVM(os="windows", image=image, data_dir=data_dir, **settings)


def each_rung(seconds: float) -> dict[str, float]:
    """Return timeouts that give each rung of the shutdown ladder so many seconds."""
    others = ("launch", "boot", "input")
    return {name: seconds for name in Timeouts.model_fields if name not in others}


def run_of(vm: AsyncSmolVM) -> Any:
    """Return the run behind a VM, where a test has to speak to QEMU itself.

    Only here do the tests look behind the public class.
    """
    return vm._vm.run


async def console_shows(vm: AsyncSmolVM, text: str, times: int = 1) -> None:
    """Wait for `text` on the serial console, which is slower than the guest agent."""
    async with asyncio.timeout(BOOT):
        while vm.console_log().count(text) < times:
            await asyncio.sleep(0.1)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProgram:
    """Put a shell script before the real program of its name; $REAL is the path of the real one."""
    directory = tmp_path / "bin"
    directory.mkdir()
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{directory}:{path}")

    def write(name: str, script: str) -> None:
        real = shutil.which(name, path=path)
        (directory / name).write_text(f"#!/bin/sh\nREAL={real}\n{script}\n")
        (directory / name).chmod(0o755)

    return write


def child_named(name: str, vm_id: str | None = None) -> int:
    """Return the process id of our child whose name begins so, of one VM if several run."""
    for pid in children():
        process = Path(f"/proc/{pid}")
        named = (process / "comm").read_text().startswith(name)
        if named and vm_id in (None, (process / "cwd").readlink().name):
            return pid
    raise AssertionError(f"no {name} among our children")


def children() -> set[int]:
    """Return the process ids of this process's children, zombies included."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def processes(directory: Path) -> dict[int, str]:
    """Return the ids and names of all processes that work in `directory`.

    Every process of a VM works in the VM's directory. A zombie works nowhere.
    """
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if (entry / "cwd").readlink().is_relative_to(directory):
                found[int(entry.name)] = (entry / "comm").read_text().strip()
    return found


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """Return the open files of a process, by default of this one."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
    return found


async def closed_since(before: dict[int, str]) -> None:
    """Wait until no other descriptors are open than before.

    The owner of a VM closes a connection a moment after the attached process has left.
    """
    async with asyncio.timeout(GONE):
        while descriptors() != before:
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Prove after every test that it left no process, no descriptor, and no file of a VM."""
    ours, files = children(), descriptors()
    yield
    deadline = time.monotonic() + GONE
    while (children() - ours or processes(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not children() - ours, "processes were left"
    assert not processes(tmp_path), "processes of other owners were left"
    left = {fd: link for fd, link in descriptors().items() if files.get(fd) != link}
    assert not left, "descriptors were left"
    data = tmp_path / "data"
    assert not data.exists() or not list(data.iterdir()), "files were left"
