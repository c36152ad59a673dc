"""KVM, for real, on a host that need not have it: the tests in `inside/`, one by one.

The host guest runs once per run of pytest, in whichever worker needs it first.
"""

from __future__ import annotations

import ast
import asyncio
import fcntl
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from smolvm_async import AsyncSmolVM, HostError, SmolVMError
from smolvm_async.host.memory import available_memory
from smolvm_async.images.build.debian import DebianImage, check_host
from tests.kvm.host_guest import PROJECT, build_host_guest
from tests.kvm.inside.reports import MARK

INSIDE = Path(__file__).parent / "inside"
BEHAVIOURS = [
    node.name
    for node in ast.parse((INSIDE / "behaviours.py").read_text()).body
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
]

MEMORY = 7168  # MiB; what the doctor wants to see for a Windows guest, and a fleet
QEMU = 1280  # MiB besides; most of it is code that TCG has translated
# Seconds for the next test's result: on a quiet host, each takes 1 to 30, beside others more.
SILENCE = 600
# TCG's emulation of SVM can leave a processor of the host guest halted for ever (see the README of
# the tests). The tests without a result then run in a second host guest, and no third.
HOST_GUESTS = 2
# The kernel marks the TSC of a guest under TCG as unstable, and then a restored guest of its KVM
# stands still for as long as it ran before the snapshot.
BOOT_ARGS = "tsc=reliable"
START = (
    "mkdir -p /opt/smolvm && cd /opt/smolvm && tar -x && "
    "exec env PYTHONPATH=/opt/smolvm PYTHONUNBUFFERED=1 "
    "python3 -m pytest -q -p inside.reports -p no:cacheprovider --tb=short "
)


class Inside(NamedTuple):
    """What came of the host guest: each test's result, and all that was printed."""

    results: dict[str, dict[str, Any]]
    printed: str


@pytest.fixture(scope="session")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """Run the tests in the host guest, or take the results of the worker that has run them."""
    try:
        check_host()
    except HostError as error:
        pytest.skip(str(error))
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    kept = shared / "kvm.json"
    with (shared / "kvm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            needed, available = MEMORY + QEMU, available_memory().available
            if available < needed:
                pytest.skip(f"{available} MiB are available; the host guest needs {needed}")
            directory = tmp_path_factory.mktemp("kvm")
            kept.write_text(json.dumps(asyncio.run(run_inside(directory))))
    return Inside(*json.loads(kept.read_text()))


async def run_inside(directory: Path) -> Inside:
    """Run all tests in a host guest; if it freezes or ends, run the remaining ones in another."""
    guest = await build_host_guest()
    packed = await asyncio.to_thread(pack, directory)
    results: dict[str, dict[str, Any]] = {}
    printed: list[str] = []
    for _ in range(HOST_GUESTS):
        left = [name for name in BEHAVIOURS if name not in results]
        if not left or not await run_in(guest, directory, packed, left, results, printed):
            break
    return Inside(results, "\n".join(printed))


async def run_in(
    guest: DebianImage,
    directory: Path,
    packed: bytes,
    names: list[str],
    results: dict[str, dict[str, Any]],
    printed: list[str],
) -> bool:
    """Boot a host guest, and run tests in it; return whether it froze or ended before the end."""
    vm = AsyncSmolVM(
        os="linux",
        image=guest.disk,
        kernel=guest.kernel,
        initrd=guest.initrd,
        boot_args=f"{guest.boot_args} {BOOT_ARGS}",
        memory=MEMORY,
        cpus=2,
        accel="tcg",
        data_dir=directory / "data",
    )
    start = START + shlex.join(f"inside/behaviours.py::{name}" for name in names)
    await vm.start()
    try:
        async with asyncio.timeout(SILENCE) as silence:
            async with vm.run_stream(start, input=packed) as lines:
                async for line in lines:
                    if not line.text.startswith(MARK):
                        printed.append(line.text)
                        continue
                    silence.reschedule(asyncio.get_running_loop().time() + SILENCE)
                    result = json.loads(line.text.removeprefix(MARK))
                    results.setdefault(result["name"], result)
                    if result["name"] == BEHAVIOURS[-1]:
                        break  # it may end the host guest
    except TimeoutError:
        printed.append(f"The host guest gave no result for {SILENCE} s.")
        return True
    except SmolVMError as error:
        printed.append(f"The host guest's tests ended early: {error!r}")
        return True
    finally:
        await vm.delete()
    return False


def pack(directory: Path) -> bytes:
    """Return a tar of the library, as its wheel installs it, and of the tests."""
    build = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps")
    subprocess.run([*build, "-w", directory, PROJECT], check=True)
    (wheel,) = directory.glob("*.whl")
    tree = directory / "tree"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree)
    shutil.copytree(INSIDE, tree / "inside", ignore=shutil.ignore_patterns("__pycache__"))
    # A guest with another version of Python ignores these files, and is some seconds slower.
    compiling = ("-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash")
    subprocess.run([sys.executable, *compiling, tree], check=True)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(tree, ".")
    return packed.getvalue()


@pytest.mark.timeout(1800)  # the first one runs them all
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda name: name.removeprefix("test_"))
def test_under_kvm(behaviour: str, inside: Inside) -> None:
    result = inside.results.get(behaviour)
    assert result is not None, f"no result; the host guest printed:\n{inside.printed[-6000:]}"
    print(f"{result['seconds']:.1f} s in the host guest\n{result['output']}")
    if result["outcome"] == "skipped":
        pytest.skip(result["text"])
    assert result["outcome"] == "passed", f"in its {result['phase']}:\n{result['text']}"
