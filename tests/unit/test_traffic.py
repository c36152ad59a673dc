"""The count of a guest's frames, from the files that QEMU writes."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from typing import Any, BinaryIO

import pytest

from smolvm_async.errors import MonitorError
from smolvm_async.qemu import traffic
from smolvm_async.qemu.traffic import Traffic

pytestmark = pytest.mark.anyio


class QEMU:
    """QEMU with its `filter-dump`, as a monitor and as the network of a guest."""

    def __init__(self) -> None:
        self.files: dict[str, BinaryIO] = {}
        self.added = 0
        self.refuses = False

    def start_task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return asyncio.ensure_future(work)

    async def complete(self, command: str, arguments: Mapping[str, Any]) -> None:
        if self.refuses:
            raise MonitorError("QEMU refused it", command=command)
        if command == "object-del":
            self.files.pop(arguments["id"]).close()
            return
        assert command == "object-add"
        self.added += 1
        file = open(arguments["file"], "wb", buffering=0)  # noqa: SIM115
        file.write(bytes(24))
        self.files[arguments["id"]] = file

    def send(self, queue: str, lengths: Iterable[int], *, captured: int = 4) -> int:
        """Record frames; return the bytes of those that the file had room for."""
        total = 0
        for length in lengths:
            content = min(length, captured)
            record = struct.pack("=IIII", 1, 0, content, length) + b"\4\0\0\0"[:content]
            try:
                if self.files[f"traffic-{queue}"].write(record) < len(record):
                    break
            except PermissionError:
                break
            total += length
        return total


@pytest.fixture
async def qemu() -> QEMU:
    return QEMU()


@pytest.fixture
async def counted(qemu: QEMU) -> AsyncIterator[Traffic]:
    counted = Traffic(qemu)  # type: ignore[arg-type]
    yield counted
    counted.close()
    for file in qemu.files.values():
        file.close()


async def test_frames_of_any_length_count_from_the_first_call_on(
    qemu: QEMU, counted: Traffic
) -> None:
    assert await counted.count() == (None, None)
    assert await counted.count() == (0, 0)
    chance = random.Random(7)
    kinds: list[Callable[[], int]] = [lambda: 1514, lambda: chance.choice([0, 1, 2, 3, 4, 5, 60])]
    received = sent = 0
    for _ in range(20):
        for kind in kinds:
            received += qemu.send("tx", [kind() for _ in range(chance.randrange(6000))])
            sent += qemu.send("rx", [kind() for _ in range(3)])
        assert await counted.count() == (received, sent)


async def test_a_flood_takes_bounded_memory_and_the_count_goes_on(
    qemu: QEMU, counted: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "LIMIT", 1 << 20)
    await counted.count()
    sent = qemu.send("rx", [60] * 100_000)
    assert os.fstat(qemu.files["traffic-rx"].fileno()).st_size == 1 << 20
    assert 52_000 * 60 < sent < 53_000 * 60
    _, first = await counted.count()
    assert first in (sent, sent + 60), "QEMU has recorded a part of the last frame"
    assert qemu.added == 3, "the full file was replaced"
    assert qemu.send("rx", [1000] * 50) == 50_000
    assert await counted.count() == (0, first + 50_000)


async def test_a_host_that_cannot_count_yet_can_later(qemu: QEMU, counted: Traffic) -> None:
    qemu.refuses = True
    for _ in range(2):
        with pytest.raises(MonitorError):
            await counted.count()
    qemu.refuses = False
    assert await counted.count() == (None, None)
    assert await counted.count() == (0, 0)
