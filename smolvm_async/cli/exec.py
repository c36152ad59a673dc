"""`exec` and `shell`: commands and terminals in any running VM of this user."""

from __future__ import annotations

import asyncio
import codecs
import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from smolvm_async import AsyncSmolVM
from smolvm_async.cli.command import DataDir, Interrupts, VMId, execute, running_vm

if TYPE_CHECKING:
    from smolvm_async import GuestProcess

FAILED = 125  # as docker: the exit code if this program failed, and not the command
BLOCK = 1 << 16  # bytes of output to read at once
GRACE = 10.0  # seconds for a command to end after a signal, as of `docker stop`

Command = Annotated[
    list[str], typer.Argument(metavar="COMMAND", help="The command, and its arguments.")
]
Env = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        "-e",
        metavar="NAME=VALUE",
        help="A variable for the command; NAME alone passes this program's value. May be given "
        "several times.",
    ),
]
Workdir = Annotated[
    str | None,
    typer.Option(
        "--workdir",
        "-w",
        metavar="DIRECTORY",
        help="The directory to start in.",
        show_default="the user's home",
    ),
]
Tty = Annotated[bool, typer.Option("--tty", "-t", help="Give the command a terminal.")]
Interactive = Annotated[
    bool,
    typer.Option("--interactive", "-i", help="For users of docker: stdin is always passed on."),
]


def exec_command(
    vm_id: VMId,
    command: Command,
    env: Env = None,
    workdir: Workdir = None,
    tty: Tty = False,
    interactive: Interactive = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave the command running in the VM.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Run a command in a Linux VM of any process; its streams pass through as bytes.

    The exit code is the command's, 128+n if signal n has ended it, or 125 if smolvm-async failed.
    Ctrl-C ends the command, and not the VM; a second Ctrl-C kills it. Without a shell, there are no
    pipes or patterns: use sh -c. Options stand before ID.

    For example:

      smolvm-async exec office -- python3 --version

      tar c . | smolvm-async exec -w /srv office -- tar x

      smolvm-async exec -it office bash
    """
    given = GuestCommand(command, env, workdir, tty=tty, detach=detach)
    exit_with(given, running_vm(vm_id, data_dir, tell_pause=True))


def shell(vm_id: VMId, env: Env = None, workdir: Workdir = None, data_dir: DataDir = None) -> None:
    """Open a login shell in a Linux VM of any process, in this terminal.

    The shell ends with exit or Ctrl-D. Enter, ~ and . leave a VM that does not answer any more.
    """
    given = GuestCommand([], env, workdir, tty=True)
    exit_with(given, running_vm(vm_id, data_dir, tell_pause=True))


class GuestCommand:
    """A command to run, as the command line gives it. No words: a login shell.

    Raises:
        typer.BadParameter: The command is an option, or needs a terminal that does not exist.
    """

    def __init__(
        self,
        words: list[str],
        env: list[str] | None,
        workdir: str | None,
        *,
        tty: bool,
        detach: bool = False,
    ) -> None:
        words = words[1:] if words[:1] == ["--"] else words
        if words and words[0].startswith("-"):
            raise typer.BadParameter(f"{words[0]} must stand before ID", param_hint="COMMAND")
        if tty and detach:
            raise typer.BadParameter("pass either --tty or --detach", param_hint="--tty, --detach")
        if tty and not sys.stdin.isatty():
            raise typer.BadParameter(
                "stdin is not a terminal: for a script, use exec without --tty", param_hint="--tty"
            )
        # `exec`, so that no shell stands between a signal and the command.
        self.command = f"exec {shlex.join(words)}" if words else None
        self.env = variables(env or ())
        self.workdir = workdir
        self.tty = tty
        self.detach = detach

    async def run(self, vm: AsyncSmolVM, interrupts: Interrupts) -> int:
        """Run the command with the streams of this program; return its exit code."""
        from smolvm_async.cli.streams import connect, connect_terminal, terminal_size

        if self.tty:
            columns, rows = terminal_size()
            term = os.environ.get("TERM") or "xterm-256color"
            opening = vm.open_terminal(
                columns, rows, command=self.command, env=self.env, cwd=self.workdir, term=term
            )
            async with await opening as terminal:
                code = await connect_terminal(terminal)
            return 0 if code is None else _exit_code(code)
        assert self.command is not None
        spawning = vm.spawn(self.command, env=self.env, cwd=self.workdir, detached=self.detach)
        async with await spawning as process:
            if self.detach:
                return 0
            interrupts.spare_first = True
            passing = asyncio.ensure_future(_pass_on(interrupts, process, asyncio.current_task()))
            try:
                return _exit_code(await connect(process))
            finally:
                passing.cancel()

    async def run_in_background(self, vm: AsyncSmolVM) -> int:
        """Run the command without stdin; write its output to `sys.stdout`. Return its exit code."""
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        spawning = vm.spawn(f"{self.command} 2>&1", env=self.env, cwd=self.workdir)
        async with await spawning as process:
            process.close_input()
            while data := await process.stdout.read(BLOCK):
                sys.stdout.write(decoder.decode(data))
            return _exit_code(await process.wait())


async def _pass_on(
    interrupts: Interrupts, process: GuestProcess, task: asyncio.Task[Any] | None
) -> None:
    """Pass on the first signal to the process; if it does not end, cancel the task."""
    await interrupts.first.wait()
    await process.send_signal(interrupts.number)
    await asyncio.sleep(GRACE)
    if task is not None:
        task.cancel()


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def variables(texts: Iterable[str]) -> dict[str, str]:
    """Return the variables of options: `NAME=VALUE`, or `NAME` with this program's value."""
    found = {}
    for text in texts:
        name, given, value = text.partition("=")
        if given or name in os.environ:
            found[name] = value if given else os.environ[name]
    return found


def exit_with(
    command: GuestCommand,
    vm: AbstractAsyncContextManager[AsyncSmolVM],
    interrupts: Interrupts | None = None,
) -> NoReturn:
    """Run a command in a VM, and exit with its exit code."""
    interrupts = interrupts or Interrupts()

    async def work() -> int:
        async with vm as running:
            return await command.run(running, interrupts)

    raise typer.Exit(execute(work(), json=False, interrupts=interrupts, failed=FAILED))
