"""Commands through the guest agent, with QEMU's own agent, which runs on this host."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from smolvm_async.controls.agent import linux
from smolvm_async.errors import (
    CommandFailedError,
    CommandTimeoutError,
    ConfigError,
    ConnectionLostError,
    GuestAgentError,
    VMNotRunningError,
)
from tests.agent import (
    DIALOGUE,
    SOON,
    Guest,
    Host,
    check_dialogue,
    first_of,
    sleepers,
    until_sleeping,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
async def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guest]:
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setattr(linux, "DIRECTORY", str(files))
    async with Host.running(tmp_path) as host:
        guest = Guest(host)
        yield guest
        async with asyncio.timeout(SOON):
            while [*files.iterdir()] and host.process.returncode is None:
                await asyncio.sleep(0.01)
        await guest.session.close()


async def test_exit_code_and_output(guest: Guest) -> None:
    assert await guest.result("echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
    assert await guest.result("kill -9 $$") == (-9, b"", b"")
    assert await guest.result("exec true") == (0, b"", b"")
    assert (await guest.result("if"))[0] == 2
    assert await guest.result('echo "$#$*"; pwd; umask', env={"HOME": "/usr"}) == (
        *(0, b"0\n" + f"{Path.home()}\n".encode() + b"0022\n", b""),
    )


@pytest.mark.parametrize(
    ("command", "result"),
    [
        ("true", (0, b"", b"")),
        ("echo out", (0, b"out\n", b"")),
        ("echo err >&2", (0, b"", b"err\n")),
        ("echo out; echo err >&2", (0, b"out\n", b"err\n")),
        ("sleep 0.2; echo out", (0, b"out\n", b"")),
        ("echo out; sleep 0.2; echo err >&2", (0, b"out\n", b"err\n")),
        ("echo out; false", (1, b"out\n", b"")),
        ("set -e; false; echo out", (1, b"", b"")),
        ("echo out; exit 0", (0, b"out\n", b"")),
        ("exec echo out", (0, b"out\n", b"")),
        ("trap 'echo bye; exit 5' EXIT; echo out", (5, b"out\nbye\n", b"")),
        ("kill() { echo no; }; echo out", (0, b"out\n", b"")),
        ("(echo out); (exit 0)", (0, b"out\n", b"")),
        ("kill -TERM $$; sleep 1", (-15, b"", b"")),
    ],
)
async def test_whatever_ends_a_command_its_output_is_whole(
    guest: Guest, command: str, result: tuple[int, bytes, bytes]
) -> None:
    assert await guest.result(command) == result


@pytest.mark.parametrize(
    "text",
    ["'\"\\ \n\t%PATH% $HOME `id` ${x} $(id) ! # ; & | > < * ? ~", "é 😀 \x01\x7f", "x" * 100_000],
)
async def test_a_command_and_its_variables_arrive_as_they_were_sent(
    guest: Guest, text: str
) -> None:
    end = "a line that nobody writes"
    script = f"cat <<'{end}'\n{text}\n{end}\n"
    assert await guest.result(script) == (0, text.encode() + b"\n", b"")
    assert await guest.result('printf %s "$V"', env={"V": text}) == (0, text.encode(), b"")


async def test_neither_command_nor_variable_is_on_a_command_line_or_in_a_file(
    guest: Guest, tmp_path: Path
) -> None:
    secret = f"secret-{os.getpid()}-text"
    command = f": {secret}; ls -l {linux.DIRECTORY}; echo started; exec sleep 1003"
    output: dict[str, bytearray] = {}
    async with guest.executing(command, output, env={"V": secret}) as execution:
        await until_sleeping("1003", 1)
        found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if secret in content(path)]
        files = [path for path in tmp_path.rglob("*") if path.is_file() and secret in content(path)]
        while b"started" not in output.get("stdout", b""):
            await asyncio.sleep(0.01)
    assert (found, files) == ([], [])
    assert execution.exit_code is None
    modes = [line.split()[0] for line in output["stdout"].decode().splitlines() if "smolvm" in line]
    assert modes == ["-rw-------", "-rw-------"]


def content(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


async def test_input_arrives_and_may_be_long(guest: Guest) -> None:
    data = os.urandom(3 << 20)
    code, output, _ = await guest.result("sha256sum; stat -Lc %a /dev/fd/0", content=data)
    digest, mode = output.decode().split("  -\n")
    assert (code, digest, mode) == (0, hashlib.sha256(data).hexdigest(), "600\n")
    assert await guest.result("cat") == (0, b"", b"")


async def test_long_binary_output_is_complete(guest: Guest) -> None:
    size = 40 << 20  # bytes; the agent itself keeps 16 MiB
    code, output, errors = await guest.result(f"head -c {size} /dev/urandom | tee /dev/stderr")
    assert (code, len(output)) == (0, size)
    assert output == errors


async def test_lines_arrive_while_the_command_runs(guest: Guest) -> None:
    output: dict[str, bytearray] = {}
    async with guest.executing("echo one; read line; echo two; sleep 1004", output):
        async with asyncio.timeout(SOON):
            while bytes(output.get("stdout", b"")) != b"one\ntwo\n":
                await asyncio.sleep(0.01)
    assert sleepers("1004") == []


async def test_a_child_that_is_left_behind_does_not_hold_the_command(guest: Guest) -> None:
    code, pid, _ = await guest.result("sleep 1005 & echo $!")
    await until_sleeping("1005", 1)
    assert (code, sleepers("1005")) == (0, [int(pid)])
    os.kill(int(pid), signal.SIGKILL)
    code, pid, _ = await guest.result("(sleep 1005; true) & echo $!")  # a shell, too
    assert code == 0
    await until_sleeping("1005", 1)
    os.kill(int(pid), signal.SIGKILL)
    os.kill(sleepers("1005")[0], signal.SIGKILL)
    writer = "sh -c 'while :; do echo y; done' & echo $! >&2; sleep 0.2; exit 4"
    code, output, pid = await guest.result(writer)  # it never stops writing
    os.kill(int(pid), signal.SIGKILL)
    assert (code, output[:4]) == (4, b"y\ny\n")


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 12, 50, None])
async def test_leaving_the_block_kills_the_whole_tree(guest: Guest, steps: int | None) -> None:
    command = "sleep 1006 & setsid sleep 1006 & (sleep 1006; echo) & sh -c 'sleep 1006; echo'"
    async with guest.executing(command):
        if steps is None:
            await until_sleeping("1006", 4)
        for _ in range(steps or 0):
            await asyncio.sleep(0)
    assert await guest.result("true") == (0, b"", b"")  # the agent answers
    assert sleepers("1006") == []


async def test_three_hundred_commands_many_at_once(guest: Guest) -> None:
    async def one(number: int) -> None:
        result = await guest.result(f"echo {number}; exit {number % 7}")
        assert result == (number % 7, f"{number}\n".encode(), b"")

    await asyncio.gather(*[one(number) for number in range(300)])


async def test_an_agent_that_ends_is_an_error_and_the_next_one_works(guest: Guest) -> None:
    output: dict[str, bytearray] = {}
    async with guest.executing("echo running; sleep 1007", output) as execution:
        await until_sleeping("1007", 1)
        await guest.host.kill()
        restarting = asyncio.ensure_future(guest.host.start())
        await asyncio.wait([execution.ended])
        await restarting
    assert execution.exit_code is None
    assert execution.error is not None
    async with asyncio.timeout(SOON):
        while sleepers("1007"):
            await asyncio.sleep(0.01)
    assert await guest.result("echo again") == (0, b"again\n", b"")


async def test_a_guest_without_room_is_told(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "DIRECTORY", "/proc/none")
    with pytest.raises(ConnectionLostError, match="did not keep the command's output"):
        await guest.result("true")


async def test_run_and_run_stream_are_the_same_as_over_ssh(guest: Guest) -> None:
    result = await guest.run("tr a-z A-Z; echo $V >&2", input="aé\n", env={"V": "v"}, check=True)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Aé\n", "v\n")
    assert (await guest.run("printf '\\377'", text=False)).stdout == b"\xff"
    assert (await guest.run("printf '\\377'")).stdout == "\ufffd"
    with pytest.raises(CommandFailedError, match="ended with exit code 3"):
        await guest.run("exit 3", check=True)
    with pytest.raises(CommandTimeoutError, match=r"within 0.5 s, and was killed") as caught:
        await guest.run("echo before; sleep 1008", timeout=0.5)
    assert caught.value.stdout == "before\n"
    assert sleepers("1008") == []
    words = ["printf", r"%s\n", "a b", "", "'$HOME'"]
    assert (await guest.run(words, cwd="/")).stdout == "a b\n\n'$HOME'\n"
    assert (await guest.run("pwd", cwd="/usr")).stdout == "/usr\n"
    assert (await guest.run("pwd", cwd="/none", shell="login")).exit_code == 126
    with pytest.raises(ConfigError, match="cwd='' is wrong"):
        await guest.run("pwd", cwd="")
    with pytest.raises(ConfigError, match="pass a str, or a list"):
        await guest.run([])
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        await guest.run("# " + "x" * (1 << 20))
    async with guest.run_stream("echo one; echo two >&2; sleep 1009") as lines:
        seen = {(line.stream, line.text) async for line in first_of(lines, 2)}
    assert seen == {("stdout", "one"), ("stderr", "two")}
    assert sleepers("1009") == []


async def test_a_process_is_fed_while_it_runs(guest: Guest) -> None:
    async with await guest.spawn(DIALOGUE, cwd="/", env={"V": "v"}) as process:
        await check_dialogue(process)
    data = os.urandom(3 << 20)
    async with await guest.spawn(["sha256sum", "-"]) as process:
        await process.write(data)
        process.close_input()
        assert (await process.stdout.read()).split()[0] == hashlib.sha256(data).hexdigest().encode()


async def test_many_processes_get_their_first_input_and_its_end_at_once(guest: Guest) -> None:
    async def one(number: int) -> None:
        async with await guest.spawn("cat") as process:
            await process.write(f"{number}")
            process.close_input()
            assert (await process.stdout.read(), await process.wait()) == (b"%d" % number, 0)

    async with asyncio.timeout(SOON):
        await asyncio.gather(*[one(number) for number in range(30)])


async def test_a_process_gets_signals_and_ends_with_its_block(guest: Guest) -> None:
    script = "trap 'echo caught; exit 5' TERM; echo up; while :; do sleep 0.1; done"
    async with await guest.spawn(script) as process:
        assert await process.stdout.readline() == b"up\n"
        await process.terminate()
        assert (await process.stdout.read(), await process.wait()) == (b"caught\n", 5)
    async with await guest.spawn(["cat"]) as process:
        await process.send_signal(signal.SIGINT)
        assert await process.wait() == -signal.SIGINT
        await process.write("dropped")
    async with await guest.spawn("sleep 1010 & setsid sleep 1010 & sleep 1010") as process:
        await until_sleeping("1010", 3)
    assert sleepers("1010") == []
    execution: Any = process._execution
    killed = {"pid": execution._starting.result()}
    with pytest.raises(GuestAgentError, match="pid"):  # a later process may have the same id
        await guest.session.agent.execute("guest-exec-status", killed)


async def test_a_detached_process_goes_on(guest: Guest) -> None:
    async with await guest.spawn("echo no; exec sleep 1011", detached=True) as process:
        await until_sleeping("1011", 1)
    assert sleepers("1011") != []
    await process.kill()
    await until_sleeping("1011", 0)


@pytest.mark.parametrize("steps", [0, 1, 3, 8, 20, 50, 150])
async def test_a_process_whose_start_is_cancelled_leaves_nothing(guest: Guest, steps: int) -> None:
    async def use() -> None:
        async with await guest.spawn("sleep 1013 & sleep 1013; echo") as process:
            await process.write("x" * 100_000)
            process.close_input()
            await process.wait()

    using = asyncio.ensure_future(use())
    for _ in range(steps):
        await asyncio.sleep(0)
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    assert await guest.result("true") == (0, b"", b"")
    assert sleepers("1013") == []


async def test_a_process_of_an_agent_that_ends_is_lost(guest: Guest) -> None:
    async with await guest.spawn("echo up; exec sleep 1012") as process:
        assert await process.stdout.readline() == b"up\n"
        await guest.host.kill()
        with pytest.raises(ConnectionLostError, match="agent ended"):
            await process.stdout.read()
        await guest.host.start()
    await until_sleeping("1012", 0)


async def test_the_end_of_the_session_ends_a_process_whose_output_nobody_reads(
    guest: Guest,
) -> None:
    process = await guest.spawn("echo $$; yes | head -c 8M; exec sleep 1016")
    pid = int(await process.stdout.readline())
    while not process._output.full:
        await asyncio.sleep(0.01)
    waiting = asyncio.ensure_future(process.wait())
    async with asyncio.timeout(SOON):
        await guest.session.close()  # as at the end of QEMU, with which all below ends, too
        with pytest.raises(VMNotRunningError, match="QEMU has ended"):
            await waiting
    os.kill(pid, signal.SIGKILL)
    for file in Path(linux.DIRECTORY).iterdir():
        file.unlink()


async def test_a_process_that_cannot_start_is_told(guest: Guest) -> None:
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        await guest.spawn("# " + "x" * (1 << 20))
