"""Commands and files at the prompt and of agents, in guests that are reached through their agent.

The stand-in is a Windows guest here, or a Linux guest with `channel="agent"`. No Windows was run.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from smolvm_async import AsyncSmolVM, UnsupportedError
from stand_in import build_stand_in
from tests.conftest import BOOT, vm_in
from tests.integration.test_mcp import ask, create, session
from tests.integration.test_prompt import PATIENCE, Screen, cli, screen, start, words
from tests.integration.trees import digest_tree, make_tree

__all__ = ["screen"]
pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def vm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncSmolVM]:
    """A Windows guest for all tests."""
    image, data_dir = await build_stand_in(), tmp_path_factory.mktemp("agent")
    async with vm_in(data_dir, image, vm_id="office") as machine:
        await machine.wait_for("ready", BOOT)
        yield machine


async def test_exec_passes_bytes_and_exit_codes(vm: AsyncSmolVM) -> None:
    content = random.randbytes(300_000)
    place = ("-w", "/tmp", "-e", "TEXT=a  b", "office")
    given, whole, missing = await asyncio.gather(
        cli(vm, "exec", "office", "cat", given=content),
        cli(vm, "exec", *place, "--", "sh", "-c", 'pwd; echo "$TEXT" >&2; exit 7'),
        cli(vm, "exec", "-i", "office", "no-such-program"),
    )
    assert given == (0, content, b"")
    assert whole == (7, b"/tmp\n", b"a  b\n")
    assert missing[0] == 127


async def test_ctrl_c_ends_the_command_and_not_the_vm(vm: AsyncSmolVM) -> None:
    process = await start(vm, "exec", "office", "sh", "-c", "echo up; exec sleep 1301")
    async with asyncio.timeout(PATIENCE):
        assert await process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert await process.wait() != 0
    process._transport.close()
    assert "sleep 1301" not in (await vm.run("ps")).stdout


async def test_a_terminal_is_refused_and_the_alternative_named(
    vm: AsyncSmolVM, screen: Screen
) -> None:
    with pytest.raises(UnsupportedError, match=r"open_terminal\(\) is not available for Windows"):
        await vm.open_terminal()
    process = await screen.start(words(vm, "shell", "office"))
    await screen.shows(b"a terminal (shell, --tty) is not available for Windows guests.")
    await screen.shows(b"exec ID -- COMMAND")
    assert await process.wait() == 125


async def test_a_terminal_is_refused_before_the_boot(vm: AsyncSmolVM, screen: Screen) -> None:
    image = str(vm._vm.config.image)
    process = await screen.start(words(vm, "run", "-t", "--os=windows", "--id=other", image))
    await screen.shows(b"a terminal (shell, --tty) is not available for Windows guests.")
    assert await process.wait() == 125
    infos = await AsyncSmolVM.list(data_dir=vm._vm.config.data_dir)
    assert [info.vm_id for info in infos] == ["office"]


async def test_directories_are_copied_both_ways(vm: AsyncSmolVM, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree", 5)
    (tmp_path / "tree" / "link").unlink()
    assert (await cli(vm, "cp", str(tmp_path / "tree"), "office:C:/Temp/"))[:2] == (
        *(0, b"office:C:/Temp/tree\n"),
    )
    back = str(tmp_path / "back")
    assert (await cli(vm, "cp", "office:C:/Temp/tree", back))[0] == 0
    assert digest_tree(tmp_path / "back") == digest_tree(tmp_path / "tree")


async def test_an_agent_runs_programs_and_uses_files(vm: AsyncSmolVM) -> None:
    data_dir = vm._vm.config.data_dir
    await vm.snapshot("installed")
    async with session(data_dir, "--snapshot", "installed") as client:
        sandbox = await create(client, snapshot="installed")
        path = "C:/Temp/new/p.txt"
        told = await ask(client, "write_file", sandbox=sandbox, path=path, content="é\n")
        assert told == f"{path}: 3 bytes written"
        assert await ask(client, "read_file", sandbox=sandbox, path=path) == "é\n"
        run = {"command": "pwd; cat; exit 7", "cwd": "/tmp", "stdin": "€" * 50_000}
        told = await ask(client, "run_command", sandbox=sandbox, **run)
        assert told.startswith("exit code 7\n/tmp\n€€")
        assert "read_output(" in told, "the middle is left out"
        told = await ask(client, "run_command", sandbox=sandbox, command="echo err >&2; exit 5")
        assert told == "exit code 5\nerr\n"
        late = {"command": "exec sleep 1302", "timeout": 1}
        assert await ask(client, "run_command", sandbox=sandbox, **late) == "killed after 1 s\n"
    await AsyncSmolVM.delete_snapshot("installed", data_dir=data_dir)


async def test_run_starts_a_linux_vm_for_one_command_through_its_agent(
    vm: AsyncSmolVM, stand_in: Path
) -> None:
    options = ("--os=linux", "--channel=agent", "--accel=tcg", "--memory=512")
    script = "read line; echo $line $V; cat; exit 3"
    code, output, errors = await cli(
        vm, "run", *options, "-e", "V=v", str(stand_in), "--", "sh", "-c", script, given=b"a\nb\n"
    )
    assert (code, output) == (3, b"a v\nb\n"), errors
