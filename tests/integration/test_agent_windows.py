"""Commands of a Windows guest: QEMU's agent runs on this host, with a `powershell.exe` in `sh`.

They test how a command gets to PowerShell, cmd.exe or a program, and its output back. No Windows
was run.
"""

from __future__ import annotations

import asyncio
import filecmp
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import pytest

from smolvm_async.controls.agent import windows
from smolvm_async.controls.agent.contents import AgentAccess
from smolvm_async.controls.agent.transfer import AgentFiles
from smolvm_async.controls.files.environment import Environment
from smolvm_async.controls.files.files import Files
from smolvm_async.controls.files.transport import GuestFiles
from smolvm_async.errors import (
    CommandTimeoutError,
    ConfigError,
    ConnectionLostError,
    FileTransferError,
    UnsupportedError,
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
    windows_programs,
)
from tests.integration.trees import make_tree

pytestmark = pytest.mark.anyio

HARD = '\'"\\ \n\t%PATH% $HOME `id` ${x} $(id) ! # ; & | > < * ? ~ ^ %%i é 😀 \x7f\\\\" \\'


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    async with Host.running(tmp_path, windows_programs(tmp_path)) as host:
        guest = Guest(host, windows)
        yield guest
        async with asyncio.timeout(SOON):
            while left(tmp_path) and host.process.returncode is None:
                await asyncio.sleep(0.01)
        await guest.session.close()


def left(directory: Path) -> list[str]:
    """Return the files of commands."""
    return [path.name for path in directory.iterdir() if path.name.startswith("C:")]


async def test_powershell_and_cmd_run_scripts_and_a_list_is_a_program(guest: Guest) -> None:
    assert await guest.result("echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
    for shell, name in (("raw", "command.ps1"), ("cmd", "command.cmd")):
        code, output, _ = await guest.result('printf %s "$0"', shell=shell)
        assert (code, output.decode().split("\\")[-1]) == (0, f"{name}.sh")
    words = ["printf", r"%s\n", HARD, "", "a b", "\\", 'x"y\\"', "c:\\d\\ "]
    result = await guest.run(words, check=True)
    assert result.stdout == "\n".join([*words[2:], ""])
    assert (await guest.run(["no-such-program"])).exit_code == 127
    with pytest.raises(ConfigError, match=r"shell='login' .*pass 'raw' .* or 'cmd'"):
        await guest.run("dir", shell="login")
    with pytest.raises(ConfigError, match=r"a list of words needs no shell"):
        await guest.run(["dir"], shell="cmd")


@pytest.mark.parametrize("text", [HARD, "x\n" * 50_000], ids=["hard", "long"])
async def test_a_script_its_variables_and_its_input_arrive_as_they_were_sent(
    guest: Guest, text: str
) -> None:
    script = f"cat <<'end of it'\n{text}\nend of it\n"
    assert (await guest.run(script)).stdout == f"{text}\n"
    assert (await guest.run(script, shell="cmd")).stdout == f"{text}\n"
    assert (await guest.run('printf %s "$V"', env={"V": text})).stdout == text
    assert (await guest.run("cat", input=text)).stdout == text


async def test_bytes_are_bytes_and_text_is_utf_8(guest: Guest) -> None:
    for data in (os.urandom(3 << 20), b"\xff\xfea\0\r\0\n\0", bytes(range(256))):
        assert (await guest.run(["cat"], input=data, text=False, timeout=SOON)).stdout == data
    assert (await guest.run("printf 'caf\\351'")).stdout == "caf\ufffd"


async def test_a_directory_that_does_not_exist_is_told(guest: Guest, tmp_path: Path) -> None:
    assert (await guest.run("pwd", cwd=str(tmp_path))).stdout == f"{tmp_path}\n"
    result = await guest.run("pwd", cwd="/none")
    assert (result.exit_code, result.stdout) == (126, "")
    assert "/none" in result.stderr


async def test_neither_script_nor_variable_nor_input_is_on_a_command_line(
    guest: Guest, tmp_path: Path
) -> None:
    secret = f"secret-{os.getpid()}-text"
    output: dict[str, bytearray] = {}
    command = f": {secret}; echo started; exec sleep 1103"
    async with guest.executing(
        command, output, env={"V": secret}, content=secret.encode()
    ) as execution:
        await until_sleeping("1103", 1)
        lines = [
            path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)
        ]
        modes = {path.stat().st_mode & 0o077 for path in tmp_path.iterdir() if ":" in path.name}
        async with asyncio.timeout(SOON):
            while b"started" not in output.get("stdout", b""):
                await asyncio.sleep(0.01)
    assert not [line for line in lines if secret.encode() in line]
    assert modes == {0}
    assert execution.exit_code is None
    assert sleepers("1103") == []


def readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


async def test_a_timeout_ends_the_whole_tree(guest: Guest) -> None:
    with pytest.raises(CommandTimeoutError) as caught:
        await guest.run("echo before; sh -c 'sleep 1104; echo'; echo", timeout=1.0)
    assert caught.value.stdout == "before\n"
    assert sleepers("1104") == []


@pytest.mark.parametrize("steps", [0, 1, 3, 8, 50])
async def test_a_cancelled_command_leaves_nothing(guest: Guest, steps: int) -> None:
    async with guest.executing("sh -c 'sleep 1106; echo'; echo"):
        for _ in range(steps):
            await asyncio.sleep(0)
    async with asyncio.timeout(SOON):
        while sleepers("1106"):
            await asyncio.sleep(0.01)


async def test_many_commands_at_once(guest: Guest) -> None:
    async def one(number: int) -> None:
        result = await guest.run(f"echo {number}; exit {number % 7}")
        assert (result.exit_code, result.stdout) == (number % 7, f"{number}\n")

    await asyncio.gather(*[one(number) for number in range(50)])


async def test_a_command_that_kills_the_agent_is_lost(guest: Guest) -> None:
    pid = guest.host.process.pid
    running = asyncio.ensure_future(guest.run(f"kill -KILL {pid}; exec sleep 1107"))
    await guest.host.process.wait()
    await guest.host.kill()
    await guest.host.start()
    with pytest.raises(ConnectionLostError, match="guest agent ended"):
        await running
    assert (await guest.run("echo again")).stdout == "again\n"


class WindowsFiles(Files, Environment):
    """The files of a guest whose drive is a directory of the agent's."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    async def _files(self, feature: str) -> AbstractAsyncContextManager[GuestFiles]:
        return nullcontext(AgentFiles(self._guest.session, self._guest.transport, windows=True))

    def _require(self, feature: str) -> None:
        pass

    def _has_windows_paths(self) -> bool:
        return True


async def test_files_go_and_come_the_same(guest: Guest, tmp_path: Path) -> None:
    files, drive = WindowsFiles(guest), tmp_path / "C:"
    make_tree(tmp_path / "tree", 20)
    (tmp_path / "tree" / "link").unlink()
    (tmp_path / "caf\u00e9").write_bytes(os.urandom(100_000))
    sent = await files.upload_file(tmp_path / "caf\u00e9", "C:\\Program Files\\x y\\")
    assert sent == "C:/Program Files/x y/caf\u00e9"
    assert filecmp.cmp(tmp_path / "caf\u00e9", tmp_path / sent, shallow=False)
    got = await files.download_file("C:\\Program Files\\x y\\caf\u00e9", tmp_path / "back")
    assert filecmp.cmp(got, tmp_path / "caf\u00e9", shallow=False)
    for _ in range(2):  # the second copy is merged
        assert await files.upload_file(tmp_path / "tree", "C:/") == "C:/tree"
    came = await files.download_file("C:/tree/", tmp_path / "came")
    assert contents(came) == contents(drive / "tree") == contents(tmp_path / "tree")
    assert sorted(path.name for path in drive.iterdir()) == ["Program Files", "tree"]
    with pytest.raises(FileTransferError, match="No such file"):
        await files.download_file("C:/none", tmp_path / "none")
    (tmp_path / "tree" / "aux.c").touch()
    with pytest.raises(ConfigError, match="name of a device"):
        await files.upload_file(tmp_path / "tree", "C:/other")
    (tmp_path / "nul").touch()
    with pytest.raises(FileTransferError, match="name of a device"):
        await files.upload_file(tmp_path / "nul", "C:/")
    assert sorted(path.name for path in drive.iterdir()) == ["Program Files", "tree"]
    shutil.rmtree(drive)  # it would look like a file of a command


async def test_files_are_read_written_listed_and_removed(guest: Guest, tmp_path: Path) -> None:
    access = AgentAccess(AgentFiles(guest.session, guest.transport, windows=True))
    await access.make_directory("C:/a b/c", True)
    await access.write("C:/a b/file", b"one", None, True)
    await access.write("C:/a b/file", b"two", None, False)
    assert await access.read("C:/a b/file", 1, None) == b"wo"
    assert [info.path for info in await access.entries("C:/a b")] == ["C:/a b/c", "C:/a b/file"]
    with pytest.raises(FileTransferError, match="not empty"):
        await access.remove("C:/a b", False)
    await access.remove("C:/a b", True)
    assert not await access.exists("C:/a b")
    (tmp_path / "C:").rmdir()


def contents(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


async def test_variables_are_in_all_commands(guest: Guest) -> None:
    files = WindowsFiles(guest)
    value = HARD.replace("\x7f", "")
    assert await files.set_env_vars({"A": value, "B": "b"}) == ["A", "B"]
    assert (await guest.run('printf %s "$A$B"', env={"B": "own"})).stdout == f"{value}own"
    assert await files.list_env_vars() == {"A": value, "B": "b"}
    assert await files.unset_env_vars(["A"]) == {"A": value}
    assert await files.list_env_vars() == {"B": "b"}
    assert (await guest.run('printf %s "$A$B"')).stdout == "b"


async def test_lines_stream_and_a_child_that_is_left_behind_does_not_hold_the_command(
    guest: Guest,
) -> None:
    async with guest.run_stream("echo one; read line; echo two >&2; exec sleep 1108") as lines:
        seen = {(line.stream, line.text) async for line in first_of(lines, 2)}
    assert seen == {("stdout", "one"), ("stderr", "two")}
    assert sleepers("1108") == []
    result = await guest.run("sleep 1109 & echo $!; exit 3")
    assert (result.exit_code, sleepers("1109")) == (3, [int(result.stdout)])
    os.kill(int(result.stdout), signal.SIGKILL)


async def test_a_process_is_fed_while_it_runs(guest: Guest) -> None:
    async with await guest.spawn(DIALOGUE) as process:
        await check_dialogue(process)
    data = os.urandom(1 << 20)
    async with await guest.spawn(["cat"]) as process:
        await process.write(data)
        process.close_input()
        assert await process.stdout.read() == data


async def test_a_process_is_killed_by_each_signal_that_ends_programs(guest: Guest) -> None:
    async with await guest.spawn("echo up; exec sleep 1110") as process:
        assert await process.stdout.readline() == b"up\n"
        with pytest.raises(UnsupportedError, match="no SIGUSR1"):
            await process.send_signal(signal.SIGUSR1)
        await process.send_signal(signal.SIGINT)
        assert await process.wait() != 0
    assert sleepers("1110") == []
    async with await guest.spawn(["cat"]) as process:
        await process.kill()  # perhaps before its files are there
        assert await process.wait() != 0
        assert await process.stdout.read() == b""


@pytest.mark.parametrize("steps", [1, 3, 8, 50])
async def test_a_process_whose_start_is_cancelled_leaves_nothing(guest: Guest, steps: int) -> None:
    starting = asyncio.ensure_future(guest.spawn("sleep 1112"))
    for _ in range(steps):
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert sleepers("1112") == []


async def test_a_detached_process_goes_on_and_leaves_no_file(guest: Guest, tmp_path: Path) -> None:
    go_on, kept = tmp_path / "go on", tmp_path / "kept"
    script = f"while [ ! -e '{go_on}' ]; do sleep 0.05; done; echo out; echo a >'{kept}'"
    async with await guest.spawn(script, detached=True) as process:
        await process.write("dropped")
        process.close_input()
    go_on.touch()
    async with asyncio.timeout(SOON):
        while not kept.exists() or left(tmp_path):
            await asyncio.sleep(0.01)
    async with await guest.spawn(["sleep", "1111"], detached=True) as process:
        await until_sleeping("1111", 1)
    await process.kill()
    assert sleepers("1111") == []
