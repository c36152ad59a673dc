"""The code that all commands share: options, finding a VM, signals, errors and exit codes."""

from __future__ import annotations

import asyncio
import shlex
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import typer

from smolvm_async import (
    AsyncSmolVM,
    ConfigError,
    ConnectionLostError,
    HostError,
    SmolVMError,
    SnapshotNotFoundError,
    VMNotFoundError,
    VMNotRunningError,
)
from smolvm_async.cli.output import complain, in_options, write_json
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.state.status import ACTIVE, Status

T = TypeVar("T")

FAILED, WRONG = 1, 2
CODES: dict[type[Exception], int] = {
    VMNotFoundError: 4,
    SnapshotNotFoundError: 4,
    HostError: 3,
    ConfigError: WRONG,
}
ENDING = 2.0  # seconds for the owner to say that the VM has ended, after a connection was lost
SHORT_PAUSE = 1.0  # seconds of a pause that need no message
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def complete_vm_id(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the ids in the data directory that begin with `incomplete`, each with its status."""
    try:
        infos = asyncio.run(AsyncSmolVM.list(data_dir=context.params.get("data_dir")))
    except (SmolVMError, OSError):
        return []
    return [(info.vm_id, info.status) for info in infos if info.vm_id.startswith(incomplete)]


VMId = Annotated[
    str,
    typer.Argument(metavar="ID", help="The VM's id.", autocompletion=complete_vm_id),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIRECTORY",
        help="The directory of the VMs.",
        show_default="$XDG_STATE_HOME/smolvm-async or ~/.local/state/smolvm-async",
    ),
]
Keep = Annotated[
    bool, typer.Option("--keep", help="Keep the VM afterwards, so that it can boot again.")
]
VNC = Annotated[
    Literal["loopback", "unix"] | None,
    typer.Option(help="Turn on VNC; 'smolvm-async vnc ID' shows how to connect."),
]
Mount = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR[:PATH][:rw]",
        help="A host directory that a Linux guest sees at PATH, by default /workspace/NAME; with "
        ":rw, the guest may change it; may be given several times.",
    ),
]
Detach = Annotated[
    bool,
    typer.Option(
        "--detach", "-d", help="Run the VM in the background, and show its id when it is ready."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON instead of text.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="Seconds to wait for the guest to power down; 0 does not press the power button.",
        show_default="60",
    ),
]


Label = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="A text of your own; may be given several times."),
]
TTL = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Seconds after which the VM is deleted, kept or not."),
]
IdleTimeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Seconds without a command, input or other call after which the VM is paused; the "
        "next call resumes it.",
    ),
]


def labels_given(texts: list[str] | None) -> dict[str, str]:
    """Return the labels of the option `--label`, by name."""
    for text in texts or ():
        if "=" not in text:
            raise typer.BadParameter(f"pass KEY=VALUE, not {text!r}", param_hint="--label")
    return dict(text.split("=", 1) for text in texts or ())


async def find_vm(
    vm_id: str,
    data_dir: str | None,
    on_progress: ProgressCallback | None = None,
    password: str | None = None,
) -> AsyncSmolVM:
    """Find a VM by `AsyncSmolVM.from_id()`; raise an error that names a command to try."""
    try:
        return await AsyncSmolVM.from_id(
            vm_id, password=password, data_dir=data_dir, on_progress=on_progress
        )
    except VMNotFoundError:
        raise no_such_vm(vm_id) from None


@asynccontextmanager
async def running_vm(
    vm_id: str, data_dir: str | None, *, tell_pause: bool = False
) -> AsyncIterator[AsyncSmolVM]:
    """Attach to a running VM during the block.

    Args:
        vm_id, data_dir: The values of the command line.
        tell_pause: Whether to say on stderr that the block waits because the VM is paused.
    """
    vm = await find_vm(vm_id, data_dir)
    if vm.status not in ACTIVE:
        raise VMNotRunningError(
            f"{vm_id} is not running (it is {vm.status}): run {next_step(vm, data_dir)}."
        )
    telling = asyncio.ensure_future(_tell_pause(vm, data_dir)) if tell_pause else None
    try:
        async with end_told(vm):
            yield vm
    finally:
        if telling is not None:
            telling.cancel()
        await vm.detach()


@asynccontextmanager
async def end_told(vm: AsyncSmolVM) -> AsyncIterator[None]:
    """Raise the reason of the VM's end in place of a lost connection, if the VM has ended."""
    try:
        yield
    except ConnectionLostError as lost:
        with suppress(TimeoutError):
            async with asyncio.timeout(ENDING):
                await vm.wait_stopped()  # this raises the reason, if the VM was not just stopped
            raise VMNotRunningError(f"{vm.vm_id} has ended.") from lost
        raise


async def _tell_pause(vm: AsyncSmolVM, data_dir: str | None) -> None:
    await asyncio.sleep(SHORT_PAUSE)
    if vm.status is Status.PAUSED:
        text = f"waiting, since {vm.vm_id} is paused. To go on: {next_step(vm, data_dir)}"
        complain("Note", text, "bold yellow")


def next_step(vm: AsyncSmolVM, data_dir: str | None) -> str:
    """Return the command that boots a kept VM again, resumes a VM, or repairs an orphan."""
    place = f" --data-dir {shlex.quote(data_dir)}" if data_dir else ""
    if vm.status is Status.ORPHANED:
        return f"smolvm-async prune{place}"
    if vm.status is Status.PAUSED:
        return f"smolvm-async resume {vm.vm_id}{place}"
    return f"smolvm-async run --id {vm.vm_id}{place}"


def no_such_vm(vm_id: str) -> VMNotFoundError:
    """Return the error for an unknown VM id."""
    return VMNotFoundError(
        f"there is no VM {vm_id!r}: smolvm-async list shows all VMs. If the VMs are not in the "
        "default directory, pass --data-dir."
    )


class Interrupts:
    """The signals that cancel a command: SIGINT, SIGTERM and SIGHUP.

    Attributes:
        spare_first: Whether the first signal only sets `first`, and SIGHUP never cancels the
            command, since a closing terminal may send several SIGHUPs.
        first: Set by the first signal.
        number: The latest signal.
    """

    def __init__(self, *, spare_first: bool = False) -> None:
        self.first = asyncio.Event()
        self.number = signal.SIGINT
        self.spare_first = spare_first

    async def during(self, command: Coroutine[Any, Any, T]) -> T:
        """Run the command; let the signals cancel it."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup, or in the background
                loop.add_signal_handler(number, self._on_signal, number, task)
        return await command

    def _on_signal(self, number: signal.Signals, task: asyncio.Task[Any]) -> None:
        self.number = number
        if not self.spare_first or (self.first.is_set() and number != signal.SIGHUP):
            task.cancel()
        self.first.set()


def execute(
    command: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
    *,
    json: bool,
    interrupts: Interrupts | None = None,
    failed: int | None = None,
) -> T:
    """Run a command; turn an error into a message and an exit code.

    Pass a function that returns the command if making the command can fail.

    Args:
        failed: The exit code of every error, instead of the codes in `CODES`.
    """
    interrupts = interrupts or Interrupts()
    try:
        return asyncio.run(interrupts.during(command() if callable(command) else command))
    except asyncio.CancelledError:
        number = interrupts.number
        fail("Interrupted", f"interrupted by {number.name}", 128 + number, json=json)
    except BrokenPipeError:
        raise typer.Exit(FAILED) from None  # the reader of stdout is gone
    except (SmolVMError, OSError) as error:
        code = next((CODES[kind] for kind in CODES if isinstance(error, kind)), FAILED)
        code = code if failed is None else failed
        data = error.to_json() if isinstance(error, SmolVMError) else {}
        fail(type(error).__name__, in_options(str(error)), code, json=json, data=data)


def fail(
    kind: str, message: str, code: int, *, json: bool, data: Mapping[str, object] | None = None
) -> NoReturn:
    """Write an error and exit. `message` contains the hint; `data` has more fields for JSON."""
    if json:
        write_json({"error": {**(data or {}), "type": kind, "message": message}})
    else:
        complain("Error", message, "bold red")
    raise typer.Exit(code)
