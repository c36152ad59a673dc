"""`exec` and `shell`: commands and terminals in any running VM of this user."""

from __future__ import annotations

import asyncio
import codecs
import os
import shlex
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
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
    """Run a command in a VM of any process; its streams pass through as bytes.

    The exit code is the command's, 128+n if signal n has ended it, or 125 if smolvm-async failed.
    Ctrl-C ends the command, and not the VM; a second Ctrl-C kills it. Without a shell, there are no
    pipes or patterns: use sh -c, or in Windows cmd /c or powershell -Command. Options stand before
    ID. In Windows, and through a guest agent, there is no --tty. In Windows, an exit code over 255
    is 255; over SSH, there is no --detach.

    For example:

      smolvm-async exec office -- python3 --version

      tar c . | smolvm-async exec -w /srv office -- tar x

      smolvm-async exec -it office bash

      smolvm-async exec windows -- powershell -Command "Get-Process | Select -First 3"
    """
    if vm_id.startswith("-"):  # options of the command may be unknown here, so this became the ID
        raise typer.BadParameter(f"exec has no option {vm_id}", param_hint="ID")
    given = GuestCommand(command, env, workdir, tty=tty, detach=detach)
    exit_with(given, given.in_vm(running_vm(vm_id, data_dir, tell_pause=True)))


def shell(vm_id: VMId, env: Env = None, workdir: Workdir = None, data_dir: DataDir = None) -> None:
    """Open a login shell in a VM of any process, in this terminal; not in Windows or by an agent.

    The shell ends with exit or Ctrl-D. Enter, ~ and . leave a VM that does not answer any more.
    """
    given = GuestCommand([], env, workdir, tty=True)
    exit_with(given, given.in_vm(running_vm(vm_id, data_dir, tell_pause=True)))


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
        self.words = words
        self.env = variables(env or ())
        self.workdir = workdir
        self.tty = tty
        self.detach = detach

    async def open(self, vm: AsyncSmolVM) -> GuestProcess:
        """Start the command as soon as the guest is ready.

        Raises:
            UnsupportedError: The guest cannot do this, or has no guest agent.
        """
        if not self.tty:
            return await vm.spawn(self.words, env=self.env, cwd=self.workdir, detached=self.detach)
        from smolvm_async.cli.streams import terminal_size

        columns, rows = terminal_size()
        # `exec`, so that no shell stands between a signal and the command.
        command = f"exec {shlex.join(self.words)}" if self.words else None
        term = os.environ.get("TERM") or "xterm-256color"
        return await vm.open_terminal(
            columns, rows, command=command, env=self.env, cwd=self.workdir, term=term
        )

    @asynccontextmanager
    async def in_vm(
        self, vm: AbstractAsyncContextManager[AsyncSmolVM]
    ) -> AsyncIterator[GuestProcess]:
        """Run the command in this VM during the block."""
        async with vm as running, await self.open(running) as process:
            yield process

    async def connect(self, process: GuestProcess, interrupts: Interrupts) -> int:
        """Connect the streams of this program to the process; return its exit code."""
        from smolvm_async.cli.streams import connect, connect_terminal
        from smolvm_async.controls.commands.processes import Terminal

        if isinstance(process, Terminal):
            code = await connect_terminal(process)
            return 0 if code is None else to_exit_code(code)
        if self.detach:
            return 0
        interrupts.spare_first = True
        passing = asyncio.ensure_future(_pass_on(interrupts, process, asyncio.current_task()))
        try:
            return to_exit_code(await connect(process))
        finally:
            passing.cancel()

    async def run_in_background(self, vm: AsyncSmolVM) -> int:
        """Run the command without stdin; write its output to `sys.stdout`. Return its exit code."""
        async with await vm.spawn(self.words, env=self.env, cwd=self.workdir) as process:
            process.close_input()
            await asyncio.gather(_write(process.stdout), _write(process.stderr))
            return to_exit_code(await process.wait())


async def _write(stream: asyncio.StreamReader) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    while data := await stream.read(BLOCK):
        sys.stdout.write(decoder.decode(data))


async def _pass_on(
    interrupts: Interrupts, process: GuestProcess, task: asyncio.Task[Any] | None
) -> None:
    """Pass on the first signal to the process; if it does not end, cancel the task."""
    await interrupts.first.wait()
    await process.send_signal(interrupts.number)
    await asyncio.sleep(GRACE)
    if task is not None:
        task.cancel()


def to_exit_code(code: int) -> int:
    """Return an exit code that this program can have: Windows has bigger ones."""
    return min(code, 255) if code >= 0 else 128 - code


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
    process: AbstractAsyncContextManager[GuestProcess],
    interrupts: Interrupts | None = None,
) -> NoReturn:
    """Connect this program to the process of a command, and exit with its exit code."""
    interrupts = interrupts or Interrupts()

    async def work() -> int:
        async with process as running:
            return await command.connect(running, interrupts)

    raise typer.Exit(execute(work(), json=False, interrupts=interrupts, failed=FAILED))
