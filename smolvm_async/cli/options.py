"""The options and arguments that commands share, and the VM that an id means."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated

import typer

from smolvm_async import AsyncSmolVM, SmolVMError, VMNotFoundError, VMNotRunningError
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.state.record import ACTIVE


def complete_vm_id(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The ids of the VMs in the data directory, with what each is doing."""
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
        help="Where the VMs are.",
        show_default="$XDG_STATE_HOME/smolvm-async or ~/.local/state/smolvm-async",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="How long the guest may take to power down; 0 leaves the power button out.",
        show_default="60",
    ),
]


async def find_vm(
    vm_id: str, data_dir: str | None, on_progress: ProgressCallback | None = None
) -> AsyncSmolVM:
    """`AsyncSmolVM.from_id()`, whose error names the command that helps.

    Raises:
        VMNotFoundError: No VM has this id.
    """
    try:
        return await AsyncSmolVM.from_id(vm_id, data_dir=data_dir, on_progress=on_progress)
    except VMNotFoundError:
        raise no_such_vm(vm_id) from None


@contextlib.asynccontextmanager
async def running_vm(vm_id: str, data_dir: str | None) -> AsyncIterator[AsyncSmolVM]:
    """A VM that another process runs, for the time of the block.

    Raises:
        VMNotFoundError: No VM has this id.
        VMNotRunningError: It is at rest.
    """
    vm = await find_vm(vm_id, data_dir)
    if vm.status not in ACTIVE:
        raise VMNotRunningError(f"{vm_id} does not run: it is {vm.status}.")
    try:
        yield vm
    finally:
        await vm.detach()


def no_such_vm(vm_id: str) -> VMNotFoundError:
    """What to raise for an id that no VM has."""
    return VMNotFoundError(
        f"there is no VM {vm_id!r}: smolvm-async list shows which there are; "
        "--data-dir says where, if that is not the default."
    )
