"""The guest agent's channel, with QEMU's own agent, which runs on this host."""

from __future__ import annotations

import asyncio
import base64
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from smolvm_async.errors import ConnectionLostError, GuestAgentError, VMTimeoutError
from tests.agent import Host

pytestmark = pytest.mark.anyio

NEVER = 0.05  # seconds for an answer that does not come


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with Host.running(tmp_path) as host:
        yield host


async def test_the_agent_answers_and_refuses(host: Host) -> None:
    agent: Any = host.channel
    assert await agent.execute("guest-ping") == {}
    information = await agent.execute("guest-info")
    assert {"name": "guest-exec", "enabled": True, "success-response": True} in information[
        "supported_commands"
    ]
    with pytest.raises(GuestAgentError, match="refused no-such-command") as caught:
        await agent.execute("no-such-command")
    assert caught.value.error_class == "CommandNotFound"
    with pytest.raises(GuestAgentError, match="refused guest-file-read") as caught:
        await agent.execute("guest-file-read", {"handle": 12345})
    assert caught.value.error_class == "GenericError"
    assert await agent.execute("guest-ping") == {}


async def test_a_file_goes_and_comes_back_in_pieces(host: Host, tmp_path: Path) -> None:
    content = bytes(range(256)) * 1024
    path, agent = str(tmp_path / "file"), cast(Any, host.channel)
    handle = await agent.execute("guest-file-open", {"path": path, "mode": "w+"})
    for start in range(0, len(content), 65536):
        piece = base64.b64encode(content[start : start + 65536]).decode()
        await agent.execute("guest-file-write", {"handle": handle, "buf-b64": piece})
    await agent.execute("guest-file-seek", {"handle": handle, "offset": 0, "whence": "set"})
    back = b""
    while True:
        read = await agent.execute("guest-file-read", {"handle": handle, "count": 65536})
        back += base64.b64decode(read["buf-b64"])
        if read["eof"]:
            break
    await agent.execute("guest-file-close", {"handle": handle})
    assert back == content


async def test_cancelled_calls_leave_the_channel_usable(host: Host) -> None:
    for wait in range(100):
        call = asyncio.ensure_future(host.channel.execute("guest-info"))
        for _ in range(wait % 10):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        assert await host.channel.execute("guest-ping") == {}


async def test_an_agent_that_stops_answering_answers_again(host: Host) -> None:
    await host.channel.execute("guest-ping")
    host.process.send_signal(signal.SIGSTOP)
    for command in ("guest-info", "guest-ping", "guest-ping"):
        with pytest.raises(VMTimeoutError, match=f"did not answer {command} within 0.05 s"):
            await host.channel.execute(command, timeout=NEVER)
    host.process.send_signal(signal.SIGCONT)
    assert await host.channel.execute("guest-ping") == {}


async def test_a_cut_request_is_not_executed(host: Host, tmp_path: Path) -> None:
    """A call that is cancelled while it writes leaves half a line in the port."""
    await host.channel.execute("guest-ping")
    host.process.send_signal(signal.SIGSTOP)
    arguments = {"path": str(tmp_path / "cut"), "mode": "w", "more": "x" * (1 << 22)}
    with pytest.raises(VMTimeoutError):
        await host.channel.execute("guest-file-open", arguments, timeout=NEVER)
    host.process.send_signal(signal.SIGCONT)
    assert await host.channel.execute("guest-ping") == {}
    assert not (tmp_path / "cut").exists()


async def test_an_agent_that_starts_again_answers(host: Host) -> None:
    await host.channel.execute("guest-ping")
    host.process.send_signal(signal.SIGSTOP)
    call = asyncio.ensure_future(host.channel.execute("guest-ping"))
    await asyncio.sleep(NEVER)
    await host.kill()
    with pytest.raises(ConnectionLostError, match="the guest agent ended during guest-ping"):
        await call
    call = asyncio.ensure_future(host.channel.execute("guest-ping"))
    await asyncio.sleep(NEVER)
    await host.start()
    assert await call == {}
