"""The library on a minimal Debian 13, with the QEMU of the release and the one of its backports."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

from smolvm_async import CommandError
from tests.debian13.host import Debian13, debian13

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(3000)]

SHORT = (  # doctor, built-in Linux, main job, kept VM, crash, desktop, snapshots
    "tests/integration/test_doctor.py::test_this_host_runs_guests",
    "tests/integration/test_launch.py::test_qemu_warns_of_nothing",
    "tests/integration/test_linux.py::test_the_newcomers_line_answers",
    "tests/integration/test_main_job.py::test_the_main_job",
    "tests/integration/test_kept.py::test_every_boot_has_the_same_command_line_with_the_machine_type_pinned",
    "tests/faults/test_crashes.py::test_a_process_that_is_killed_cancels_the_body_and_is_named",
    "tests/integration/test_screen.py::test_screenshots_at_every_time_of_a_vms_life",
    "tests/integration/test_snapshots.py::test_what_is_damaged_or_missing_is_refused_before_anything_is_made",
    "tests/faults/test_snapshots.py::test_a_twin_or_a_disk_that_fails_leaves_the_vm_unharmed",
)
LONG = (
    *("tests/integration/test_doctor.py", "tests/integration/test_linux.py"),
    *("tests/integration/test_main_job.py", "tests/integration/test_kept.py"),
    *("tests/integration/test_fleet.py", "tests/integration/test_other_processes.py"),
    *("tests/integration/test_snapshots.py", "tests/faults/test_snapshots.py"),
    *("tests/faults/test_crashes.py", "tests/integration/test_launch.py::test_any_path_will_do"),
    "tests/integration/test_launch.py::test_qemu_warns_of_nothing",
    "tests/integration/test_screen.py::test_screenshots_at_every_time_of_a_vms_life",
    "tests/integration/test_screen.py::test_waiting_for_the_screen",
    "tests/integration/test_screen.py::test_the_firmwares_set_up_is_navigated_by_keys_alone",
)
# `tests/run.sh --all` sets SMOLVM_ASYNC_EVERY_FAULT=1.
ALL = "SMOLVM_ASYNC_EVERY_FAULT" in os.environ
RUNS = [("10.0", LONG), ("11.1", LONG)] if ALL else [("10.0", SHORT)]


@pytest.mark.parametrize(("qemu", "names"), RUNS, ids=[qemu for qemu, _ in RUNS])
async def test_the_library_works_with_qemu(
    qemu: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    async with debian13(backports=qemu != "10.0", work=tmp_path) as system:
        assert f"version {qemu}." in await system.run("qemu-system-x86_64", "--version")
        assert "Python 3.13." in await system.run("python", "--version")
        assert not (system.root / "usr/bin/xz").exists()  # a newcomer's system may lack it, too
        await run_tests(system, *names)
        answers = await system.run("python", "examples/fleet.py", "--size=4")
        assert "4 have answered" in answers


async def run_tests(system: Debian13, *names: str) -> None:
    """Run tests of this library there. All have to pass, and none may be skipped."""
    options = ("-q", "-rfEs", "-p", "no:cacheprovider", "--junitxml=results.xml")
    try:
        printed = await system.run("python", "-m", "pytest", *options, *names)
    except CommandError as error:
        pytest.fail(error.output)
    suite = ElementTree.parse(system.root / "src/results.xml").getroot()[0]
    assert int(suite.attrib["tests"]) >= len(names)
    assert suite.attrib["skipped"] == "0", printed
