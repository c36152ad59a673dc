"""`list`, `stop`, `delete` and `prune`: commands for the VMs of all processes."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer

from smolvm_async import (
    AsyncSmolVM,
    Rung,
    ShutdownReport,
    Status,
    VMInfo,
    VMNotRunningError,
)
from smolvm_async.cli.command import (
    WRONG,
    DataDir,
    Json,
    Timeout,
    VMId,
    complete_vm_id,
    execute,
    fail,
    find_vm,
    no_such_vm,
)
from smolvm_async.cli.output import (
    busy,
    describe_ending,
    ending_fields,
    say,
    show_table,
    write_json,
)

AGES = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
LEFT, RIGHT = {"no_wrap": True}, {"no_wrap": True, "justify": "right"}
STYLES: dict[str, dict[str, Any]] = {  # of columns; the type aligns other columns
    "vm_id": {"no_wrap": True, "min_width": 8},
    "image": {"overflow": "fold"},
}


def list_vms(data_dir: DataDir = None, json: Json = False) -> None:
    """Show the VMs of this user: running, kept and orphaned."""
    infos = execute(AsyncSmolVM.list(data_dir=data_dir), json=json)
    if json:
        write_json([asdict(info) for info in infos])
    elif infos:
        # Derive the columns from VMInfo, numbers on the right: a new field needs no change here.
        columns = {
            field.name.removeprefix("vm_").upper(): STYLES.get(
                field.name, RIGHT if str(field.type).startswith(("int", "float")) else LEFT
            )
            for field in fields(VMInfo)
        }
        rows = [[_cell(info, field.name) for field in fields(VMInfo)] for info in infos]
        show_table(columns, rows)
    else:
        say("There are no VMs.")


def _cell(info: VMInfo, name: str) -> str:
    value = getattr(info, name)
    if name == "age":
        return _age(info.age)
    if name == "memory":
        return f"{info.memory} MiB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def _age(seconds: float) -> str:
    """Format seconds in the largest unit that fits at least once."""
    length, unit = next((unit for unit in AGES if seconds >= unit[0]), AGES[-1])
    return f"{seconds // length:.0f} {unit}"


def stop(
    vm_id: VMId, timeout: Timeout = None, data_dir: DataDir = None, json: Json = False
) -> None:
    """Power down a VM of any process, and show how the VM ended."""

    async def work() -> ShutdownReport | None:
        vm = await find_vm(vm_id, data_dir)
        if vm.status is Status.ORPHANED:
            raise VMNotRunningError(f"the owner of {vm_id} has died: run smolvm-async prune.")
        if vm.status in (Status.STOPPED, Status.CRASHED):
            return None
        try:
            return await vm.stop(timeout)
        finally:
            await vm.detach()

    with busy(f"Stopping {vm_id}", json=json):
        report = execute(work(), json=json)
    if json:
        write_json(ending_fields(vm_id, report or ShutdownReport(Rung.NONE)))
    else:
        say(describe_ending(vm_id, report) if report else f"{vm_id} is already stopped.")


def delete(
    vm_ids: Annotated[
        list[str],
        typer.Argument(metavar="ID...", help="The VMs' ids.", autocompletion=complete_vm_id),
    ],
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Delete kept VMs without asking.")
    ] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Delete VMs with all their files. Running VMs are killed first.

    Without --yes, the command asks before it deletes kept VMs.
    """
    vm_ids = list(dict.fromkeys(vm_ids))
    infos = {info.vm_id: info for info in execute(AsyncSmolVM.list(data_dir=data_dir), json=json)}
    kept = [vm_id for vm_id in vm_ids if vm_id in infos and infos[vm_id].keep]
    if kept and not yes:
        _confirm(", ".join(kept), json)

    async def work() -> None:
        for vm_id in vm_ids:
            if vm_id not in infos:
                raise no_such_vm(vm_id)  # before anything is deleted
        for vm_id in vm_ids:
            await (await find_vm(vm_id, data_dir)).delete()
            if not json:
                say(f"{vm_id} is deleted.")

    execute(work(), json=json)
    if json:
        write_json({"deleted": vm_ids})


def _confirm(names: str, json: bool) -> None:
    if json or not sys.stdin.isatty():
        fail("ConfigError", f"{names} is a kept VM: to delete it, pass --yes.", WRONG, json=json)
    typer.confirm(f"Delete permanently: {names}?", abort=True)


def prune(
    gone_host: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="A host that never runs again: its VMs have no owners any more."
        ),
    ] = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Remove VMs whose owners have died. Kept VMs stay and become stopped.

    VMs of other hosts that share the directory stay as they are.
    """
    infos = execute(AsyncSmolVM.prune(data_dir=data_dir, gone_host=gone_host), json=json)
    if json:
        write_json([asdict(info) for info in infos])
        return
    for info in infos:
        kept = f"{info.vm_id} is kept; its status is now stopped."
        say(kept if info.keep else f"Removed {info.vm_id}.")
    if not infos:
        say("Nothing to remove.")
