"""`logs`: the serial console of a guest, and the logs of a VM's processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from smolvm_async import VMNotFoundError, VMNotRunningError
from smolvm_async.cli.command import DataDir, Json, VMId, execute, find_vm, no_such_vm
from smolvm_async.cli.output import write_json, write_text
from smolvm_async.state.logs import PROCESSES, read_log
from smolvm_async.state.status import ACTIVE

if TYPE_CHECKING:
    Source = str
else:  # the choices that `--source` offers and accepts
    Source = Literal["console", *PROCESSES]


def logs(
    vm_id: VMId,
    source: Annotated[
        Source,
        typer.Option(help="The serial console (of a running VM) or the log of a process."),
    ] = "console",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show new text as it comes, until the VM ends.")
    ] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Show the end of a VM's serial console, or of the log of one of its processes.

    On a terminal, the guest's control sequences are removed.
    """

    def show(text: str) -> None:
        if json:
            write_json({"vm_id": vm_id, "source": source, "text": text})
        else:
            write_text(text)

    async def show_log() -> None:
        texts = read_log(vm_id, source, data_dir=data_dir, follow=follow)
        try:
            if not follow:
                show("".join([text async for text in texts]))
                return
            async for text in texts:
                show(text)
        except VMNotFoundError:
            raise no_such_vm(vm_id) from None

    async def show_console() -> None:
        vm = await find_vm(vm_id, data_dir)
        if vm.status not in ACTIVE:
            raise VMNotRunningError(
                f"{vm_id} is {vm.status}, and only a running VM has a console; to read a log, pass "
                f"{' or '.join(f'--source {process}' for process in PROCESSES)}."
            )
        try:
            if not follow:
                show(vm.console_log())
                return
            async for text in vm.follow_console():
                show(text)
        finally:
            await vm.detach()

    execute(show_console() if source == "console" else show_log(), json=json)
