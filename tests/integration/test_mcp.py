"""The MCP server, with the SDK's own client over stdio, and with clients that break the rules."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, Screenshot

mcp = pytest.importorskip("mcp", reason="the extra `mcp` is not installed")
pytestmark = pytest.mark.anyio

PATIENCE = 120  # seconds, on a busy host


def command(data_dir: Path, *options: str | Path) -> list[str]:
    fixed = ("-m", "smolvm_async", "mcp", "--accel", "tcg", "--data-dir", data_dir)
    return [str(part) for part in (*fixed, *options)]


@asynccontextmanager
async def session(data_dir: Path, *options: str | Path) -> AsyncIterator[Any]:
    """A client of a server of its own."""
    server = mcp.StdioServerParameters(
        command=sys.executable, args=command(data_dir, *options), env=dict(os.environ)
    )
    async with mcp.Client(mcp.stdio_client(server)) as client:
        yield client


async def ask(client: Any, tool: str, **arguments: Any) -> str:
    """Call a tool; return its texts, or raise a `ValueError` with its error."""
    result = await client.call_tool(tool, arguments)
    text = "\n".join(part.text for part in result.content if part.type == "text")
    if result.is_error:
        raise ValueError(text)
    return text


async def look(client: Any, tool: str, **arguments: Any) -> Screenshot:
    """Call a tool, and return its picture."""
    result = await client.call_tool(tool, arguments)
    (picture,) = [part for part in result.content if part.type == "image"]
    assert picture.mime_type == "image/png"
    return Screenshot.from_png(base64.b64decode(picture.data))


async def create(client: Any, **arguments: Any) -> str:
    """Create a sandbox, and return its id."""
    return (await ask(client, "create_sandbox", **arguments)).partition(":")[0]


async def test_an_agent_writes_a_program_runs_it_and_forks_the_sandbox(data_dir: Path) -> None:
    async with session(data_dir) as client:
        steps: list[tuple[float, str | None]] = []

        async def note(done: float, _: float | None, step: str | None) -> None:
            steps.append((done, step))

        result = await client.call_tool("create_sandbox", {}, progress_callback=note)
        sandbox = result.content[0].text.partition(":")[0]
        assert steps == sorted(steps)
        assert "launching" in str(steps)
        program = {"path": "/root/new/p.py", "content": "print('é', *range(5000))\nexit(7)\n"}
        assert "bytes written" in await ask(client, "write_file", sandbox=sandbox, **program)
        assert (
            await ask(client, "read_file", sandbox=sandbox, path=program["path"])
            == (program["content"])
        )
        await ask(client, "write_file", sandbox=sandbox, path="/é", content="€" * 5000)
        page = await ask(client, "read_file", sandbox=sandbox, path="/é")
        assert page.startswith("€" * 2666 + "\n[bytes 0 to 7998: pass offset=7998")
        run = {"sandbox": sandbox, "command": "python3 /root/new/p.py"}
        said = await ask(client, "run_command", **run)
        assert said.startswith("exit code 7\né 0 1 2")
        assert said.endswith("4999\n")
        assert "read_output(" in said, "the middle is left out"
        page = await ask(client, "read_output", sandbox=sandbox, offset=4000)
        assert "\n[characters 4000 to 12000 of" in page
        (clone,) = [
            line.partition(":")[0]
            for line in (await ask(client, "fork_sandbox", sandbox=sandbox)).splitlines()
        ]
        await ask(client, "run_command", sandbox=clone, command="rm /root/new/p.py")
        assert "print" in await ask(client, "read_file", sandbox=sandbox, path=program["path"])
        with pytest.raises(ValueError, match="No such file"):
            await ask(client, "read_file", sandbox=clone, path=program["path"])
        late = await ask(client, "run_command", sandbox=clone, command="echo a; sleep 9", timeout=1)
        assert late == "killed after 1 s\na\n"
        there = {"command": "pwd >&2; head -c 3", "cwd": "/tmp", "stdin": "é" * 1_000_000}
        assert (
            await ask(client, "run_command", sandbox=clone, **there) == "exit code 0\n/tmp\né\ufffd"
        )
        reach = "import socket; socket.create_connection(('1.1.1.1', 80), 5)"
        said = await ask(client, "run_command", sandbox=clone, command=f'python3 -c "{reach}"')
        assert said.startswith("exit code 1\n"), "the network is off"


async def test_an_agent_looks_at_the_firmware_and_presses_keys(
    blank_image: Path, data_dir: Path
) -> None:
    async with session(data_dir, "--windows-image", blank_image) as client:
        sandbox = await create(client, os="windows", memory=2048)
        first = await look(client, "screenshot", sandbox=sandbox)
        drawn = await look(
            client, "wait_for_screen", sandbox=sandbox, changed=True, timeout=PATIENCE
        )
        assert drawn != first
        assert (await look(client, "press_keys", sandbox=sandbox, keys="Escape")).size
        whole = {"action": "zoom", "region": [0, 0, 64, 40]}
        assert (await look(client, "computer", sandbox=sandbox, action=whole)).size
        with pytest.raises(ValueError, match=r"ActionError: .*'Nokey' is not a known key"):
            await ask(client, "press_keys", sandbox=sandbox, keys="Nokey")
        await ask(client, "snapshot_sandbox", sandbox=sandbox, name="firmware")
        with pytest.raises(ValueError, match="2048 of at most 8192 MiB"):
            await create(client, os="windows", memory=8000)
        assert await create(client, snapshot="firmware") != sandbox
        assert "snapshots: firmware" in await ask(client, "list_sandboxes")
    assert await AsyncSmolVM.snapshots(data_dir=data_dir) == []


async def test_a_hundred_sandboxes_at_once_are_as_many_as_the_limit(
    blank_image: Path, data_dir: Path
) -> None:
    options = ("--linux-image", blank_image, "--max-sandboxes", "2")
    async with session(data_dir, *options) as client:
        asked = (create(client, memory=128) for _ in range(100))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        made = [answer for answer in answers if isinstance(answer, str)]
        refused = {str(answer) for answer in answers if isinstance(answer, ValueError)}
        assert len(made) == 2
        assert len(answers) == 100
        (reason,) = refused
        assert "2 of at most 2 sandboxes" in reason
        await ask(client, "delete_sandbox", sandbox=made[0])
        with pytest.raises(ValueError, match=f"no sandbox '{made[0]}'"):
            await ask(client, "delete_sandbox", sandbox=made[0])
        await create(client, memory=128)


async def test_a_sandbox_is_deleted_after_its_lifetime(blank_image: Path, data_dir: Path) -> None:
    options = ("--linux-image", blank_image, "--lifetime", "2")
    async with session(data_dir, *options) as client:
        sandbox = await create(client, memory=128)
        while sandbox in await ask(client, "list_sandboxes"):
            await asyncio.sleep(0.1)
        with pytest.raises(ValueError, match="deleted after its lifetime of 2 s"):
            await ask(client, "screenshot", sandbox=sandbox)


# Clients that break the rules


async def started(data_dir: Path, *options: str | Path) -> Process:
    """A server, before the client's first message."""
    arguments = command(data_dir, *options)
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=PIPE, stdout=PIPE, limit=1 << 24
    )


def message(method: str, number: int | None = None, **params: Any) -> bytes:
    number_if_any = {} if number is None else {"id": number}
    body = {"jsonrpc": "2.0", "method": method, "params": params, **number_if_any}
    return json.dumps(body).encode() + b"\n"


async def answer(server: Process, number: int) -> Any:
    """Return the answer to a message, and skip all others."""
    assert server.stdout is not None
    async with asyncio.timeout(PATIENCE):
        while line := await server.stdout.readline():
            if (reply := json.loads(line)).get("id") == number:
                return reply
    raise AssertionError("the server has ended")


def tell(server: Process, *messages: bytes) -> None:
    assert server.stdin is not None
    server.stdin.writelines(messages)


async def introduced(data_dir: Path, image: Path) -> Process:
    """A server with a sandbox, and a client that has said hello."""
    server = await started(data_dir, "--linux-image", image)
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}}
    tell(server, message("initialize", 1, **hello, clientInfo={"name": "test", "version": "1"}))
    assert "result" in await answer(server, 1)
    tell(server, message("notifications/initialized"), call(2, "create_sandbox"))
    assert not (await answer(server, 2))["result"].get("isError")
    return server


def call(number: int, tool: str, **arguments: Any) -> bytes:
    if tool == "create_sandbox":
        arguments = {"memory": 128}  # its image is empty: it starts and stops in a moment
    return message("tools/call", number, name=tool, arguments=arguments)


async def test_a_client_may_send_nonsense(blank_image: Path, data_dir: Path) -> None:
    server = await introduced(data_dir, blank_image)
    tell(server, b"nonsense\n", b"\xff\xfe\x00\n", b"[]\n", b"{}\n", b"\n", b"[" * 5000 + b"\n")
    tell(server, message("no/such/method", 10), message("tools/call", 11, name=7))
    assert "error" in await answer(server, 10)
    assert "error" in await answer(server, 11)
    wrongs: dict[str, dict[str, Any]] = {
        "no_such_tool": {},
        "screenshot": {"sandbox": 7},
        "list_sandboxes": {"memroy": 5},
        "computer": {"sandbox": "x", "action": {"action": "fly"}},
        "write_file": {"sandbox": "../../etc", "path": "/x", "content": "x"},
    }
    for number, (tool, wrong) in enumerate(wrongs.items(), start=20):
        tell(server, call(number, tool, **wrong))
        assert (await answer(server, number))["result"]["isError"], tool
    assert server.stdin is not None
    server.stdin.close()
    assert await asyncio.wait_for(server.wait(), PATIENCE) == 0


async def test_nothing_is_left_of_a_client_that_disconnects_in_the_middle(
    blank_image: Path, data_dir: Path
) -> None:
    server = await introduced(data_dir, blank_image)
    tell(server, *(call(number, "create_sandbox") for number in range(3, 6)))
    tell(server, b'{"jsonrpc": "2.0", "id": 6, "meth')
    pipes: Any = server._transport  # type: ignore[attr-defined]
    for fd in (0, 1):
        pipes.get_pipe_transport(fd).close()  # as if the client were killed
    assert await asyncio.wait_for(server.wait(), PATIENCE) == 0


async def test_no_sandbox_outlives_a_server_that_is_killed(
    blank_image: Path, data_dir: Path
) -> None:
    server = await introduced(data_dir, blank_image)
    server.kill()
    await server.wait()
    assert len(await AsyncSmolVM.prune(data_dir=data_dir)) == 1  # only files were left


async def test_nothing_is_left_of_a_server_that_is_ended_by_a_signal(
    blank_image: Path, data_dir: Path
) -> None:
    server = await introduced(data_dir, blank_image)
    tell(server, call(3, "create_sandbox"), call(4, "create_sandbox"))
    server.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(server.wait(), PATIENCE) == 128 + signal.SIGTERM
