"""The host's end of the parked process, against a guest that is a socket."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator

import pytest

from smolvm_async.guests import BUILT_IN
from smolvm_async.qemu.parked import LIMIT, Parked
from tests.unit.test_linux import arguments

pytestmark = pytest.mark.anyio

SOON = 30.0  # seconds; an answer takes milliseconds
NEVER = 0.05  # seconds for an answer that does not come


@pytest.fixture
async def parked() -> AsyncIterator[Parked]:
    parked = Parked()
    yield parked
    parked.close()


@pytest.fixture
async def guest(parked: Parked) -> socket.socket:
    return parked.open()


async def test_the_message_is_a_line_of_five_words(parked: Parked, guest: socket.socket) -> None:
    with guest:
        before = time.time()
        setting = asyncio.ensure_future(
            parked.set_right("one", b"host\nkey", b"keys\n", timeout=SOON)
        )
        await asyncio.sleep(0)
        seed, clock, *others = guest.recv(LIMIT).decode().split()
        guest.sendall(b"right\n")
        assert await setting == ("", True)
    assert len(set(bytes.fromhex(seed))) > 30
    assert before - 0.001 <= float(clock) <= time.time()
    assert others == ["one", b"host\nkey".hex(), b"keys\n".hex()]


async def test_a_late_answer_is_no_answer_to_the_next_message(
    parked: Parked, guest: socket.socket
) -> None:
    seeds = []
    with guest:
        for _ in range(2):
            assert not (await parked.set_right("one", b"", b"", timeout=NEVER))[1]
            seeds.append(guest.recv(LIMIT).split()[0])
            guest.sendall(b"right\n")
    assert seeds[0] != seeds[1]


async def test_a_process_that_has_parked_again_is_no_answer(
    parked: Parked, guest: socket.socket
) -> None:
    with guest:
        guest.sendall(b"par")
        setting = asyncio.ensure_future(parked.set_right("one", b"", b"", timeout=SOON))
        for part in (b"ked\nparked\n", b"ri", b"ght\n"):
            await asyncio.sleep(0.01)
            guest.sendall(part)
        assert await setting == ("", True)
        guest.sendall(b"parked\n")
        assert await parked.wait_parked(SOON) == ""


async def test_the_guests_reason_is_passed_on_without_control_characters(
    parked: Parked, guest: socket.socket
) -> None:
    with guest:
        setting = asyncio.ensure_future(parked.set_right("one", b"", b"", timeout=SOON))
        await asyncio.sleep(0)
        guest.sendall(b"not \x1b[31mreseeded\n")
        assert await setting == ("not reseeded", True)


async def test_silence_and_floods_end_with_the_deadline(
    parked: Parked, guest: socket.socket
) -> None:
    with guest:
        problem, done = await parked.set_right("one", b"", b"", timeout=NEVER)
        assert "did not answer within 0.05 s" in problem
        assert not done
        guest.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                guest.sendall(bytes(1_000_000))
        assert not (await parked.set_right("one", b"", b"", timeout=NEVER))[1]
        assert len(parked.text()) <= LIMIT


async def test_the_end_of_qemu_is_noticed_at_once(parked: Parked, guest: socket.socket) -> None:
    setting = asyncio.ensure_future(parked.set_right("one", b"", b"", timeout=SOON))
    await asyncio.sleep(0)
    guest.close()
    assert await setting == ("QEMU has ended", False)
    ended = await parked.set_right("one", b"", b"", timeout=SOON)
    assert ended == ("QEMU has ended", False)


def test_only_a_guest_with_the_process_has_the_port() -> None:
    assert BUILT_IN["linux"].login == "fw_cfg"
    assert "smolvm.control" not in " ".join(arguments())
