"""Logging: a logger for each module, the VM's id on each record, no secrets."""

from __future__ import annotations

import asyncio
import logging
import shlex
from pathlib import Path

import pytest

from smolvm_async import AsyncSmolVM
from smolvm_async.foundation.log import current_vm, get_logger
from tests.unit.test_structure import MODULES

pytestmark = pytest.mark.anyio


def test_every_logger_has_its_modules_name_and_adds_the_vms_id() -> None:
    text = "".join(path.read_text() for name, path in MODULES.items() if name != "foundation.log")
    assert "logging.getLogger" not in text
    loggers = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if name.startswith("smolvm_async.") and isinstance(logger, logging.Logger)
    ]
    used = [logger for logger in loggers if logger.filters]
    assert len(used) > 5
    for logger in used:
        assert logger.name.removeprefix("smolvm_async.").removesuffix(".wire") in MODULES


def test_a_record_outside_of_any_vm_has_an_empty_id(caplog: pytest.LogCaptureFixture) -> None:
    get_logger("smolvm_async.test").warning("%d %%", 5)
    token = current_vm.set("vm-1")
    get_logger("smolvm_async.test").warning("%d %%", 5)
    current_vm.reset(token)
    assert [record.vm_id for record in caplog.records] == ["", "vm-1"]  # type: ignore[attr-defined]
    assert [record.getMessage() for record in caplog.records] == ["5 %", "vm-1: 5 %"]


async def test_each_record_of_a_vm_names_it_and_debug_shows_the_command_lines(
    blank_image: Path, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="smolvm_async")

    async def run(vm_id: str) -> None:
        async with AsyncSmolVM(
            os="windows", image=blank_image, data_dir=data_dir, accel="tcg", vm_id=vm_id
        ) as vm:
            await vm.stop(timeout=0)

    await asyncio.gather(run("left"), run("right"))
    ours = [record for record in caplog.records if record.name.startswith("smolvm_async")]
    for vm_id in ("left", "right"):
        mine = [record for record in ours if record.__dict__["vm_id"] == vm_id]
        lines = [
            record.getMessage()
            for record in mine
            if record.name == "smolvm_async.foundation.process"
        ]
        words = {line.split()[1]: shlex.split(line) for line in lines}
        assert all(line.startswith(f"{vm_id}: ") for line in lines)
        assert any(f"guest={vm_id},debug-threads=on" in line for line in words.values())
        assert any("--tpmstate" in line for line in words.values())
        assert "smolvm_async.qemu.shutdown" in {record.name for record in mine}
    assert {record.__dict__["vm_id"] for record in ours} == {"left", "right"}


def test_a_record_that_is_kept_keeps_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    get_logger("smolvm_async.test").warning("%s: %s", 5, OSError("no space"))
    (record,) = caplog.records
    assert record.args == (5, "no space")
