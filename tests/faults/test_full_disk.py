"""A full disk: the error says so, and nothing is left."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from smolvm_async import AsyncSmolVM, LaunchError, Rung, Status
from tests.conftest import children, fill_up
from tests.faults.actors import make

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("free", [0, 4096, 65536, 262144, 524288])
async def test_a_start_says_where_there_is_no_space_and_leaves_nothing(
    blank_image: Path, small_disk: Path, free: int
) -> None:
    data_dir = small_disk / "data"
    data_dir.mkdir(0o700)
    filler = fill_up(small_disk)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - free)
    for _ in range(2):
        vm = make(str(blank_image), str(data_dir), False)
        with pytest.raises(LaunchError) as raised:
            await vm.start()
        assert str(data_dir / "vm") in str(raised.value)
        assert "No space left on device" in str(raised.value)
        assert not children()
        assert not list(data_dir.iterdir())
    filler.unlink()
    await vm.start()  # the same object, once there is space
    await vm.delete()


async def test_a_disk_that_fills_up_meanwhile_does_not_end_a_vm(
    blank_image: Path, small_disk: Path
) -> None:
    vm = make(str(blank_image), str(small_disk / "data"), False)
    await vm.start()
    fill_up(small_disk)
    assert vm.status is Status.RUNNING
    assert (await vm.stop(timeout=0)).rung is Rung.QUIT
    assert not (small_disk / "data" / "vm" / "tpm").exists()
    assert not (small_disk / "data" / "vm" / "vars.fd").exists()
    await vm.delete()
    assert not list((small_disk / "data").iterdir())


@pytest.mark.parametrize("pruned", [False, True])
async def test_a_kept_vm_that_stops_on_a_full_disk_is_put_right(
    blank_image: Path, small_disk: Path, pruned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data_dir = small_disk / "data"
    async with make(str(blank_image), str(data_dir), True) as vm:
        filler = fill_up(small_disk)
        with caplog.at_level(logging.WARNING):
            await vm.stop(timeout=0)
    assert "No space left on device" in caplog.text
    assert [info.status for info in await AsyncSmolVM.list(data_dir=data_dir)] == ["orphaned"]
    filler.unlink()
    if pruned:
        await AsyncSmolVM.prune(data_dir=data_dir)
        assert [info.status for info in await AsyncSmolVM.list(data_dir=data_dir)] == ["stopped"]
    again = await AsyncSmolVM.from_id("vm", data_dir=data_dir)
    await again.start()
    await again.delete()
    assert not list(data_dir.iterdir())


async def test_prune_on_a_full_disk(blank_image: Path, small_disk: Path) -> None:
    data_dir = small_disk / "data"
    async with make(str(blank_image), str(data_dir), True) as vm:
        filler = fill_up(small_disk)
        await vm.stop(timeout=0)
    await AsyncSmolVM.prune(data_dir=data_dir)  # it cannot be put right yet
    assert [info.status for info in await AsyncSmolVM.list(data_dir=data_dir)] == ["orphaned"]
    filler.unlink()
    await asyncio.wait_for(AsyncSmolVM.prune(data_dir=data_dir), 30)
    assert [info.status for info in await AsyncSmolVM.list(data_dir=data_dir)] == ["stopped"]
    await (await AsyncSmolVM.from_id("vm", data_dir=data_dir)).delete()
