"""Launching without an operating system: paths, sharing, ids, an installed wheel."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import (
    AsyncSmolVM,
    ConfigError,
    LaunchError,
    Progress,
    Rung,
    ShutdownReport,
    Status,
    VMAlreadyExistsError,
)
from tests.conftest import children

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
NAMES = [
    "with space",
    "comma,snapshot=on",
    "quote\"and'",
    "per%20cent%",
    "back\\slash",
    "new\nline",
    "umläut-漢字",
    "x" * 200,
    b"not-utf8-\xff".decode(errors="surrogateescape"),
]


async def test_an_image_that_another_program_writes_is_told(
    blank_image: Path, data_dir: Path
) -> None:
    command = ["stdbuf", "-oL", "qemu-io", "-f", "qcow2", "-c", "write 0 512", "-c", "sleep 600000"]
    writer = await asyncio.create_subprocess_exec(*command, blank_image, stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        await writer.stdout.readline()  # it has opened and written it
        vm = AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg")
        with pytest.raises(LaunchError, match=r"Another program has .*blank\.qcow2 open"):
            await vm.start()
    finally:
        writer.kill()
        await writer.communicate()


@pytest.mark.parametrize("os", ["windows", "linux"])
async def test_qemu_warns_of_nothing(blank_image: Path, data_dir: Path, os: Any) -> None:
    options: Any = {"vnc": True, "port_forwards": [80], "keep": True, "cpus": 2}
    async with AsyncSmolVM(
        os=os, image=blank_image, accel="tcg", data_dir=data_dir, **options
    ) as vm:
        await vm.screenshot()
        await vm.stop(timeout=0)
        assert (data_dir / vm.vm_id / "qemu.log").read_text() == ""
    await vm.delete()


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
async def test_any_path_will_do(blank_image: Path, tmp_path: Path, name: str) -> None:
    image = tmp_path / name
    image.write_bytes(blank_image.read_bytes())
    data_dir = tmp_path / "dir" / name
    async with AsyncSmolVM(os="windows", image=image, data_dir=data_dir, accel="tcg") as vm:
        assert vm.boot_state == "firmware"
        assert [entry.name for entry in data_dir.iterdir()] == [vm.vm_id]
    assert not list(data_dir.iterdir())


async def test_eight_vms_share_an_image(blank_image: Path, data_dir: Path) -> None:
    blank_image.chmod(0o444)
    vms = [
        AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg", memory=2048)
        for _ in range(8)
    ]
    await asyncio.gather(*(vm.start() for vm in vms))
    assert len(children()) == 16
    assert len(list(data_dir.iterdir())) == 8
    await asyncio.gather(*(vm.delete() for vm in vms))


async def test_an_id_is_never_taken_twice(blank_image: Path, data_dir: Path) -> None:
    def same() -> AsyncSmolVM:
        return AsyncSmolVM(
            os="windows", image=blank_image, data_dir=data_dir, accel="tcg", vm_id="one"
        )

    async with same() as first:
        with pytest.raises(VMAlreadyExistsError, match="vm_id='one'"):
            await same().start()
        assert first.status is Status.RUNNING
    async with same():
        pass  # free again


async def test_what_is_not_a_vms_directory_is_left_alone(blank_image: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "documents" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    vm = AsyncSmolVM(
        os="windows", image=blank_image, data_dir=tmp_path, accel="tcg", vm_id="documents"
    )
    with pytest.raises(ConfigError, match="is not a VM's directory"):
        await vm.start()
    await vm.delete()
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize("below", ["", "below"])
def test_a_data_dir_that_is_a_file_or_below_one_is_refused_at_once(
    blank_image: Path, tmp_path: Path, below: str
) -> None:
    (tmp_path / "there").write_text("")
    data_dir = tmp_path / "there" / below
    with pytest.raises(ConfigError, match="data_dir="):
        AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg")


async def test_events_end_even_if_nothing_ever_started(blank_image: Path, data_dir: Path) -> None:
    vm = AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg")
    before = vm.events()
    await vm.delete()
    assert [event async for event in before] == []
    assert [event async for event in vm.events()] == []


async def test_a_block_is_entered_once(blank_image: Path, data_dir: Path) -> None:
    async with AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg") as vm:
        with pytest.raises(ConfigError, match="already"):
            async with vm:
                pass
        assert vm.status is Status.RUNNING


async def test_every_step_may_be_repeated(blank_image: Path, data_dir: Path) -> None:
    vm = AsyncSmolVM(os="windows", image=blank_image, data_dir=data_dir, accel="tcg")
    assert str(vm.status) == "created"
    assert await vm.stop() == ShutdownReport(Rung.NONE)
    await vm.start()
    await vm.start()
    reports = await asyncio.gather(vm.stop(), vm.stop(), vm.stop())
    assert len({id(report) for report in reports}) == 1
    assert str(vm.status) == "stopped"
    await vm.start()  # afresh
    await asyncio.gather(vm.delete(), vm.delete())
    await vm.delete()
    assert str(vm.status) == "deleted"


async def test_progress_is_told_and_its_errors_harm_nothing(
    blank_image: Path, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Progress] = []

    def callback(progress: Progress) -> None:
        seen.append(progress)
        raise ZeroDivisionError

    async with AsyncSmolVM(
        os="windows", image=blank_image, data_dir=data_dir, accel="tcg", on_progress=callback
    ):
        pass
    steps = [progress.message.split(":")[0] for progress in seen]
    assert steps == ["launching", "firmware", "powerdown", "powerdown", "quit"]
    assert "ZeroDivisionError" in caplog.text


def test_the_wheel_works_with_its_declared_dependencies_alone(
    blank_image: Path, tmp_path: Path, data_dir: Path
) -> None:
    script = tmp_path / "launch.py"
    script.write_text(
        "import asyncio, sys\n"
        "sys.path.append(sys.argv[3])\n"
        "from smolvm_async import AsyncSmolVM\n"
        "from stand_in import build_stand_in\n"
        "async def main():\n"
        "    await build_stand_in()\n"
        "    image, data_dir = sys.argv[1:3]\n"
        "    vm = AsyncSmolVM(os='windows', image=image, data_dir=data_dir, accel='tcg')\n"
        "    async with vm:\n"
        "        print(vm.status)\n"
        "asyncio.run(main())\n"
    )
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "-q", wheel], check=True)
    launch: list[str | Path] = [python, "-I", "-W", "error", script, blank_image, data_dir]
    launch.append(ROOT / "examples")
    output = subprocess.run(launch, check=True, capture_output=True, cwd=tmp_path)
    assert output.stdout == b"running\n"
