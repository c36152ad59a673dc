"""Commands and files of a Windows guest over SSH: OpenSSH on this host, `powershell.exe` in `sh`.

They test how a command gets to PowerShell, cmd.exe or a program, and its output back. No Windows
was run.
"""

from __future__ import annotations

import asyncio
import filecmp
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from smolvm_async import AsyncSmolVM
from smolvm_async.controls.commands.commands import Commands
from smolvm_async.controls.commands.processes import Processes
from smolvm_async.controls.commands.transport import ShellKind
from smolvm_async.controls.contents import Contents, FileAccess
from smolvm_async.controls.files.environment import Environment
from smolvm_async.controls.files.files import Files
from smolvm_async.controls.files.transport import GuestFiles
from smolvm_async.controls.ssh.contents import SFTPAccess
from smolvm_async.controls.ssh.execution import SSHTransport
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.live_input import AHEAD, PART
from smolvm_async.controls.ssh.login import make_key_pair
from smolvm_async.controls.ssh.transfer import SFTPFiles
from smolvm_async.errors import (
    CommandTimeoutError,
    ConfigError,
    FileTransferError,
    LoginError,
    UnsupportedError,
)
from smolvm_async.state.names import KNOWN_HOST
from stand_in import build_stand_in
from tests.agent import (
    DIALOGUE,
    SOON,
    check_dialogue,
    first_of,
    sleepers,
    until_sleeping,
    windows_programs,
)
from tests.conftest import BOOT, vm_in
from tests.integration.ssh_server import link_with, ssh_servers
from tests.integration.test_agent_windows import HARD, contents, readable
from tests.integration.trees import make_tree

pytestmark = pytest.mark.anyio

SESSIONS = 10  # the server's bound, as by default

# PowerShell as the server's shell, as far as the library uses it.
POWERSHELL = r"""#!/bin/sh
case $SSH_ORIGINAL_COMMAND in
'echo $PSHOME') echo 'C:\Windows\System32\WindowsPowerShell\v1.0' ;;
'$input | '*'; exit $LASTEXITCODE')
    line=${SSH_ORIGINAL_COMMAND#'$input | '}
    cat | ${line%'; exit $LASTEXITCODE'}
    ;;
internal-sftp*) exec /usr/lib/openssh/sftp-server ${SSH_ORIGINAL_COMMAND#internal-sftp} ;;
*) $SSH_ORIGINAL_COMMAND >/dev/null ;; # no command has this form but the one that kills
esac
"""


class Guest(Commands, Processes, Files, Contents, Environment):
    """The host, as if it were a Windows guest. Its drive C: is a directory in `here`."""

    def __init__(self, link: Link, here: Path, kind: str) -> None:
        self.link = link
        self.here = here
        self.kind = kind

    async def _transport(self, feature: str) -> SSHTransport:
        return SSHTransport(self.link, windows=True)

    async def _files(self, feature: str) -> AbstractAsyncContextManager[GuestFiles]:
        return SFTPFiles.opened(self.link, windows=True)

    async def _file_access(self, feature: str) -> FileAccess:
        return SFTPAccess(self.link, windows=True)

    @property
    def _shells(self) -> Sequence[str]:
        return ("raw", "cmd")

    def _has_windows_paths(self) -> bool:
        return True

    def _require(self, feature: str) -> None:
        pass

    def seconds(self, number: int) -> str:
        """Return the argument for a `sleep` that no test beside this one has."""
        return f"{number}{len(self.kind)}"

    def left(self) -> list[str]:
        """Return the files of commands."""
        return [path.name for path in self.here.rglob("*smolvm-*")]


@pytest.fixture(params=["cmd", "powershell"])
async def guest(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Guest]:
    programs, here = windows_programs(tmp_path), tmp_path / "here"
    (here / "C:").mkdir(parents=True)
    # The user's own profile may print something.
    more = f"SetEnv PATH={programs}:{os.environ['PATH']} SMOLVM_HERE={here} HOME={here}\n"
    if request.param == "powershell":
        (programs / "shell").write_text(POWERSHELL)
        (programs / "shell").chmod(0o755)
        more += f"ForceCommand {programs}/shell\n"
    with ssh_servers(tmp_path, f"-d {here}", more) as start:
        guest = Guest(link_with(start(SESSIONS)), here, request.param)
        yield guest
        async with asyncio.timeout(SOON):
            while guest.left():
                await asyncio.sleep(0.01)
        guest.link.close()


async def test_powershell_and_cmd_run_scripts_and_a_list_is_a_program(guest: Guest) -> None:
    result = await guest.run("echo out; echo err >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")
    kinds: dict[ShellKind, str] = {"raw": "command.ps1", "cmd": "command.cmd"}
    for shell, name in kinds.items():
        result = await guest.run('printf %s "$0"', shell=shell)
        assert (result.exit_code, result.stdout.split("\\")[-1]) == (0, f"{name}.sh")
    words = ["printf", r"%s\n", HARD, "", "a b", "\\", 'x"y\\"', "c:\\d\\ "]
    assert (await guest.run(words, check=True)).stdout == "\n".join([*words[2:], ""])
    with pytest.raises(ConfigError, match=r"shell='login' .*pass 'raw' .* or 'cmd'"):
        await guest.run("dir", shell="login")
    result = await guest.run("pwd", cwd="/none")
    assert (result.exit_code, result.stdout, "/none" in result.stderr) == (126, "", True)


@pytest.mark.parametrize("text", [HARD, "x\n" * 50_000], ids=["hard", "long"])
async def test_a_script_its_variables_and_its_input_arrive_as_they_were_sent(
    guest: Guest, text: str
) -> None:
    script = f"cat <<'end of it'\n{text}\nend of it\n"
    assert (await guest.run(script)).stdout == f"{text}\n"
    assert (await guest.run(script, shell="cmd")).stdout == f"{text}\n"
    assert (await guest.run('printf %s "$V"', env={"V": text})).stdout == text
    data = os.urandom(1 << 20) + text.encode()
    assert (await guest.run(["cat"], input=data, text=False, timeout=SOON)).stdout == data


async def test_neither_script_nor_variable_nor_input_is_on_a_command_line(guest: Guest) -> None:
    secret = f"secret-{os.getpid()}-text"
    command = f": {secret}; echo started; exec sleep {guest.seconds(123)}"
    async with guest.run_stream(command, env={"V": secret}) as lines:
        assert (await anext(lines)).text == "started"
        found = [
            path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)
        ]
        modes = {
            path.stat().st_mode & 0o077 for path in guest.here.iterdir() if "smolvm" in path.name
        }
    assert not [line for line in found if secret.encode() in line]
    assert modes == {0}


async def test_a_command_that_takes_too_long_ends_with_all_its_processes(guest: Guest) -> None:
    two, one = guest.seconds(124), guest.seconds(125)
    running = asyncio.ensure_future(guest.run(f"sleep {two} & sleep {two}", timeout=None))
    await until_sleeping(two, 2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until_sleeping(two, 0)
    with pytest.raises(CommandTimeoutError):
        await guest.run(["sleep", one], timeout=0.5)
    await until_sleeping(one, 0)
    assert (await guest.run("echo again")).stdout == "again\n"


async def test_many_commands_run_at_once_and_their_lines_stream(guest: Guest) -> None:
    results = await asyncio.gather(*(guest.run(f"echo {n}", timeout=SOON) for n in range(20)))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(20)]
    seconds = guest.seconds(128)
    async with guest.run_stream(
        f"echo one; read line; echo two >&2; exec sleep {seconds}"
    ) as lines:
        seen = {(line.stream, line.text) async for line in first_of(lines, 2)}
    assert seen == {("stdout", "one"), ("stderr", "two")}
    await until_sleeping(seconds, 0)


async def test_processes_are_fed_while_they_run_though_they_take_all_sessions(guest: Guest) -> None:
    async with await guest.spawn(DIALOGUE) as process:
        await check_dialogue(process)

    async def echo(data: bytes) -> bool:
        async with await guest.spawn(["cat"]) as process:
            await process.write(data[:1])
            first = await process.stdout.readexactly(1)
            writing = asyncio.ensure_future(process.write(data[1:]))
            writing.add_done_callback(lambda _: process.close_input())
            return first + await process.stdout.read() == data and await process.wait() == 0

    async with asyncio.timeout(SOON):
        sizes = [*range(1, SESSIONS + 2), 3 << 20]
        assert all(await asyncio.gather(*(echo(os.urandom(size)) for size in sizes)))


@pytest.mark.parametrize("guest", ["cmd"], indirect=True)
async def test_input_waits_for_a_process_and_is_dropped_after_its_end(guest: Guest) -> None:
    seconds, more = guest.seconds(129), bytes((AHEAD + 1) * PART)
    async with await guest.spawn(["sleep", seconds]) as process:
        writing = asyncio.ensure_future(process.write(more))
        async with asyncio.timeout(SOON):
            while len([*guest.here.rglob("smolvm-*/[0-9]*")]) < AHEAD:
                await asyncio.sleep(0.01)
        assert not writing.done()
        with pytest.raises(UnsupportedError, match="no SIGUSR1"):
            await process.send_signal(signal.SIGUSR1)
        await process.send_signal(signal.SIGINT)
        assert await process.wait() != 0
        await writing
    assert sleepers(seconds) == []
    os.mkfifo(end := guest.here / "end")
    script = f"read a; exec <&-; echo $a; read a <'{end}'; exit 5"
    async with await guest.spawn(["sh", "-c", script]) as process:
        await process.write("one\n")
        async with asyncio.timeout(SOON):
            assert await process.stdout.readline() == b"one\n"
            await process.write(more)  # the process has closed its input
        end.write_text("\n")
        assert await process.wait() == 5
        await process.write(more)
        process.close_input()


@pytest.mark.parametrize("guest", ["cmd"], indirect=True)
async def test_a_cancelled_write_leaves_no_gap_in_the_input(guest: Guest) -> None:
    data = os.urandom(2 * AHEAD * PART)  # more than fits while the output is not read
    async with await guest.spawn(["cat"]) as process:
        writing = asyncio.ensure_future(process.write(data))
        got = await process.stdout.readexactly(1)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await process.write("end")
        process.close_input()
        got += await process.stdout.read()
    assert got.endswith(b"end")
    assert data.startswith(got[:-3])
    assert len(got) % PART == 3


@pytest.mark.parametrize("guest", ["cmd"], indirect=True)
async def test_files_go_and_come_the_same(guest: Guest, tmp_path: Path) -> None:
    drive = guest.here / "C:"
    make_tree(tmp_path / "tree", 20)
    (tmp_path / "tree" / "link").unlink()
    (tmp_path / "caf\u00e9").write_bytes(os.urandom(100_000))
    sent = await guest.upload_file(tmp_path / "caf\u00e9", "C:\\Program Files\\x y\\")
    assert sent == "C:/Program Files/x y/caf\u00e9"
    got = await guest.download_file("C:\\Program Files\\x y\\caf\u00e9", tmp_path / "back")
    assert filecmp.cmp(got, tmp_path / "caf\u00e9", shallow=False)
    for _ in range(2):  # the second copy is merged
        assert await guest.upload_file(tmp_path / "tree", "C:/") == "C:/tree"
    came = await guest.download_file("C:/tree/", tmp_path / "came")
    assert contents(came) == contents(drive / "tree") == contents(tmp_path / "tree")
    (tmp_path / "nul").touch()
    with pytest.raises(FileTransferError, match="name of a device"):
        await guest.upload_file(tmp_path / "nul", "C:/")
    assert sorted(path.name for path in drive.iterdir()) == ["Program Files", "tree"]
    await guest.make_directory("C:\\a b\\c")
    for content in ("one", "two"):
        await guest.write_file("C:\\a b\\file", content)
    assert await guest.read_file("C:\\a b\\file") == "two"
    assert [info.path for info in await guest.list_files("C:\\a b")] == ["C:/a b/c", "C:/a b/file"]
    with pytest.raises(FileTransferError, match="not empty"):
        await guest.remove("C:/a b")
    await guest.remove("C:/a b", recursive=True)
    assert not await guest.exists("C:/a b")


@pytest.mark.parametrize("guest", ["cmd"], indirect=True)
async def test_variables_are_in_all_commands(guest: Guest) -> None:
    assert await guest.set_env_vars({"A": HARD, "B": "b"}) == ["A", "B"]
    assert (await guest.run('printf %s "$A$B"', env={"B": "own"})).stdout == f"{HARD}own"
    assert await guest.unset_env_vars(["A"]) == {"A": HARD}
    assert (await guest.run('printf %s "$A$B"')).stdout == "b"


async def test_a_refused_login_and_another_host_key_are_told_at_once(tmp_path: Path) -> None:
    with ssh_servers(tmp_path, more="PasswordAuthentication yes") as start:
        access = start(10)
        login = link_with(access._replace(host_key=""), final=True)  # as at the first login
        while not await login.connect():
            await asyncio.sleep(0.01)
        assert access.host_key.startswith(login.host_key)
        login.close()
        other = make_key_pair()
        for wrong, match in (
            (
                {"private_key": "", "password": "secret"},
                "refuses the login .* Check user= and passw",
            ),
            ({"private_key": other.private.decode()}, "refuses .*key=.*administrators_authorized_"),
            ({"host_key": other.public}, "another host key .* remove 'ssh_known_host'"),
        ):
            link = link_with(access._replace(**wrong), final=True)  # type: ignore[arg-type]
            with pytest.raises(LoginError, match=match) as caught:
                await link.connect()
            assert "secret" not in str(caught.value)
            link.close()


async def test_a_kept_guest_needs_its_password_again_and_shows_its_host_key(data_dir: Path) -> None:
    image = await build_stand_in(kernel_arguments=["stand_in.ssh=on"])
    given = {"vm_id": "kept", "keep": True, "password": "stand-in"}
    async with vm_in(data_dir, image, env={"V": "x y"}, **given) as vm:
        result = await vm.run('echo "$V"; cat', input="in", shell="cmd", timeout=BOOT)
        assert (result.stdout, result.exit_code) == ("x y\nin", 0)
        with pytest.raises(CommandTimeoutError):
            await vm.run("sleep 1000", timeout=2)
        async with asyncio.timeout(BOOT):  # a guest that is slow to kill it does so meanwhile
            while (await vm.run("ps | grep -c '[s]leep 1000'", BOOT)).stdout != "0\n":
                await asyncio.sleep(0.1)
        access = await vm.ssh_access()
        assert (access.user, access.password, access.private_key) == (
            *("Administrator", "stand-in", ""),
        )
        assert access.host_key
        async with await vm.spawn(DIALOGUE) as process:
            await check_dialogue(process)
        with pytest.raises(UnsupportedError, match=r"detached=True.*ends all processes.*scheduled"):
            await vm.spawn("dir", detached=True)
        async with await AsyncSmolVM.from_id("kept", data_dir=data_dir) as attached:
            await attached.write_file("C:\\a b\\file", "content")
        async with vm.fork() as (clone,):
            assert await clone.read_file("C:/a b/file") == "content"
    record = (data_dir / "kept" / "vm.json").read_text()
    assert "password" not in record
    again = await AsyncSmolVM.from_id("kept", data_dir=data_dir)
    with pytest.raises(ConfigError, match=r"password= is missing.* pass password= to from_id\(\)"):
        await again.start()
    (data_dir / "kept" / KNOWN_HOST).write_text(make_key_pair().public)
    vm = await AsyncSmolVM.from_id("kept", password="stand-in", data_dir=data_dir)
    with pytest.raises(LoginError, match="another host key"):
        async with vm:
            await vm.wait_for("ready", timeout=BOOT)
    await vm.delete()
