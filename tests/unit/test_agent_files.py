"""Files and commands through the agent of a hostile guest, whose results make no sense."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Callable
from typing import Any, cast

import pytest

from smolvm_async.controls.agent.execution import AgentTransport, execute, look, wait
from smolvm_async.controls.agent.files import PIECE, SENT, GuestFile, open_file
from smolvm_async.controls.agent.session import FEW, SMALL, Session
from smolvm_async.controls.commands.transport import Command
from smolvm_async.errors import (
    ConnectionLostError,
    GuestAgentError,
    SmolVMError,
    UnsupportedError,
)
from smolvm_async.qemu.guest_agent import GuestAgent
from smolvm_async.qemu.pauses import Pauses

pytestmark = pytest.mark.anyio

NONSENSE: list[Any] = [None, {}, [], "", 1, True, {"other": 1}]
LATE = 0.01  # seconds
SOON = 30.0  # seconds


class Agent:
    """An agent whose results a test chooses by the name of the command."""

    def __init__(self, **results: Any) -> None:
        self._results = results
        self.calls: list[tuple[str, Any]] = []

    async def execute(self, command: str, arguments: Any = None, **_: Any) -> Any:
        await asyncio.sleep(0)
        self.calls.append((command, arguments))
        result = self._results[command.removeprefix("guest-").replace("-", "_")]
        if isinstance(result, Exception):
            raise result
        return await result() if callable(result) else result

    async def execute_all(self, requests: Any, **_: Any) -> list[dict[str, Any]]:
        return [await self._reply(*request) for request in requests]

    async def _reply(self, command: str, arguments: Any) -> dict[str, Any]:
        try:
            return {"return": await self.execute(command, arguments)}
        except GuestAgentError as error:
            return {"error": {"desc": error.message, "class": error.error_class}}


def acting(agent: Agent) -> GuestAgent:
    return cast(GuestAgent, agent)


@pytest.mark.parametrize(
    "result",
    [
        *NONSENSE,
        {"count": 3, "buf-b64": "YWI=", "eof": True},
        {"count": -1, "buf-b64": "", "eof": True},
        {"count": 1, "buf-b64": "\u00e9", "eof": True},
        {"count": 2, "buf-b64": "YWI=\n", "eof": "no"},
        {"count": True, "buf-b64": "YQ==", "eof": True},
        {"count": 2, "buf-b64": "YWI="},
        {"count": PIECE + 3, "buf-b64": "YWFh" * (PIECE // 3 + 1), "eof": False},
    ],
)
async def test_bytes_of_a_file_that_make_no_sense_are_an_error(result: Any) -> None:
    with pytest.raises(GuestAgentError, match="guest agent"):
        await GuestFile(acting(Agent(file_read=result)), 1).read()


@pytest.mark.parametrize(
    "count", [*NONSENSE, {"count": 0}, {"count": -1}, {"count": SENT + 1}, {"count": "1"}]
)
async def test_a_count_of_written_bytes_that_makes_no_sense_is_an_error(count: Any) -> None:
    with pytest.raises(GuestAgentError, match="guest agent"):
        await GuestFile(acting(Agent(file_write=count)), 1).write(b"content")


async def test_a_guest_may_write_a_part_of_a_piece() -> None:
    agent = Agent(file_write={"count": 3})
    await GuestFile(acting(agent), 7).write(b"abcdefg"[:6])
    assert [arguments["buf-b64"] for _, arguments in agent.calls] == ["YWJjZGVm", "ZGVm"]


@pytest.mark.parametrize(
    "status", [*NONSENSE, {"exited": 1}, {"exited": True}, {"exited": True, "signal": "9"}]
)
async def test_a_status_that_makes_no_sense_is_an_error(status: Any) -> None:
    with pytest.raises(GuestAgentError, match=r"has no (exited|exitcode|signal)"):
        await look(acting(Agent(exec_status=status)), 1)


async def test_an_exit_code_is_negative_for_a_signal() -> None:
    agent = Agent(exec_status={"exited": True, "exitcode": 0, "signal": 9})
    assert await wait(acting(agent), 1) == -9


@pytest.mark.parametrize("handle", [*(value for value in NONSENSE if value != 1), "5", True])
async def test_a_handle_that_is_not_a_number_is_an_error(handle: Any) -> None:
    agent = Agent(file_open=handle, file_close={})
    session = Session(acting(agent), Pauses())
    with pytest.raises(GuestAgentError, match="is not a number"):
        async with open_file(session, "/file", "r"):
            pass
    assert [command for command, _ in agent.calls] == ["guest-file-open"]


async def test_a_file_whose_opening_is_cancelled_is_closed() -> None:
    answer = asyncio.Event()

    async def late() -> int:
        await answer.wait()
        return 5

    agent = Agent(file_open=late, file_close={})
    session = Session(acting(agent), Pauses())

    async def use() -> None:
        async with open_file(session, "/file", "r"):
            pass

    using = asyncio.ensure_future(use())
    await asyncio.sleep(LATE)
    using.cancel()
    await asyncio.sleep(LATE)
    answer.set()
    await asyncio.wait([using])
    assert using.cancelled()
    await session.finish()
    assert agent.calls[-1] == ("guest-file-close", {"handle": 5})
    await session.close()


FAULTS: dict[str, Callable[[], Agent]] = {
    "nonsense": lambda: Agent(exec={"pid": "1"}, exec_status={}),
    "lost": lambda: Agent(exec=ConnectionLostError("the guest agent ended")),
    "no files": lambda: Agent(
        exec={"pid": 1},
        exec_status={"exited": True, "exitcode": 0},
        file_open=GuestAgentError("no such file"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_error_of_a_command_is_told_and_nothing_hangs(fault: str) -> None:
    session = Session(acting(FAULTS[fault]()), Pauses())
    transport = AgentTransport(session)
    given = Command("true", "raw", {}, b"")
    async with transport.executing(given, lambda *_: None, lambda _: None) as execution:
        await asyncio.wait([execution.ended])
    assert execution.exit_code is None
    assert isinstance(transport.lost(execution), SmolVMError)
    assert "guest" in str(transport.lost(execution))
    await session.close()


async def test_output_that_makes_no_sense_is_an_error_while_the_command_runs() -> None:
    was_read = asyncio.Event()

    async def status() -> object:
        return {"exited": was_read.is_set(), "exitcode": 0}

    async def content() -> object:
        was_read.set()
        return {"count": 2, "eof": True}

    agent = Agent(
        exec={"pid": 1}, exec_status=status, file_open=5, file_read=content, file_close={}
    )
    session = Session(acting(agent), Pauses())
    transport = AgentTransport(session)
    given = Command("sleep 9", "raw", {}, b"")
    async with transport.executing(given, lambda *_: None, lambda _: None) as execution:
        await asyncio.wait([execution.ended])
    assert isinstance(transport.lost(execution), GuestAgentError)
    await session.close()


async def test_a_command_is_killed_although_the_answer_to_its_start_was_lost() -> None:
    starts = iter([GuestAgentError("no answer")])

    async def start() -> object:
        for error in starts:
            raise error
        return {"pid": 2}

    agent = Agent(exec=start, exec_status={"exited": True, "exitcode": 0})
    session = Session(acting(agent), Pauses())
    given = Command("sleep 9", "raw", {}, b"")
    async with AgentTransport(session).executing(given, lambda *_: None, lambda _: None) as running:
        await asyncio.wait([running.ended])
    first, second = (call for name, call in agent.calls[:2] if name == "guest-exec")
    mark = first["arg"][1].partition("=")[2].encode()
    assert mark[1:] in b64decode(second["input-data"])
    await session.close()


async def test_an_agent_that_may_not_start_programs_is_told_with_the_cure() -> None:
    refused = GuestAgentError("refused", command="guest-exec", error_class="CommandNotFound")
    with pytest.raises(UnsupportedError, match=r"does not allow guest-exec.*/etc/sysconfig"):
        await execute(acting(Agent(exec=refused)), "/bin/true", [])


async def test_one_program_removes_the_files_of_many_commands() -> None:
    removed: list[list[str]] = []

    async def remove(stems: list[str]) -> None:
        removed.append(stems)

    session = Session(acting(Agent()), Pauses())
    many = [str(number) for number in range(FEW // SMALL)]
    for stem in many:
        assert removed == []
        session.remove(stem, 0, remove)
        await asyncio.sleep(0)
    await until_equal(removed, [many])  # so many, or so much, do not wait
    session.remove("large", FEW, remove)
    await until_equal(removed, [many, ["large"]])
    session.remove("last", 0, remove)
    await session.finish()
    assert removed[2:] == [["last"]]
    await session.close()


async def until_equal(found: list[list[str]], wanted: list[list[str]]) -> None:
    async with asyncio.timeout(SOON):
        while found != wanted:
            await asyncio.sleep(0)
