"""`list`, `stop`, `delete` and `prune`: the VMs that there are, whoever owns them."""

from __future__ import annotations

import sys
from dataclasses import asdict
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
from smolvm_async.cli.ending import describe_ending, ending_fields
from smolvm_async.cli.execution import WRONG, execute, fail
from smolvm_async.cli.options import (
    DataDir,
    Json,
    Timeout,
    VMId,
    complete_vm_id,
    find_vm,
    no_such_vm,
)
from smolvm_async.cli.output import busy, say, show_table, write_json

AGES = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
COLUMNS: dict[str, dict[str, Any]] = {
    "ID": {"no_wrap": True, "min_width": 8},
    "OS": {},
    "STATUS": {"no_wrap": True},
    "OWNER": {"justify": "right", "no_wrap": True},
    "AGE": {"justify": "right", "no_wrap": True},
    "MEMORY": {"justify": "right", "no_wrap": True},
    "KEEP": {},
    "IMAGE": {"overflow": "fold"},
}


def list_vms(data_dir: DataDir = None, json: Json = False) -> None:
    """Show the VMs of this user, running or kept, and what dead owners left."""
    infos = execute(AsyncSmolVM.list(data_dir=data_dir), json=json)
    if json:
        write_json([asdict(info) for info in infos])
    elif infos:
        show_table(COLUMNS, [_row(info) for info in infos])
    else:
        say("There are no VMs.")


def _row(info: VMInfo) -> list[str]:
    owner, keep = str(info.owner or "-"), "yes" if info.keep else "no"
    age, memory = _age(info.age), f"{info.memory} MiB"
    return [info.vm_id, info.os, info.status, owner, age, memory, keep, info.image]


def _age(seconds: float) -> str:
    """Seconds in the largest unit of which there is one."""
    length, unit = next((unit for unit in AGES if seconds >= unit[0]), AGES[-1])
    return f"{seconds // length:.0f} {unit}"


def stop(
    vm_id: VMId, timeout: Timeout = None, data_dir: DataDir = None, json: Json = False
) -> None:
    """Power a VM's guest down, whichever process owns it, and say what ended it."""

    async def work() -> ShutdownReport | None:
        vm = await find_vm(vm_id, data_dir)
        if vm.status is Status.ORPHANED:
            raise VMNotRunningError(f"the owner of {vm_id} has died: smolvm-async prune clears up.")
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
        say(describe_ending(vm_id, report) if report else f"{vm_id} is stopped already.")


def delete(
    vm_ids: Annotated[
        list[str],
        typer.Argument(metavar="ID...", help="The VMs' ids.", autocompletion=complete_vm_id),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete kept VMs too, unasked.")] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Delete VMs and everything of them; those that run are killed first.

    A kept VM is gone for good: unless --yes is given, you are asked.
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
        fail("ConfigError", f"a kept VM ({names}) is deleted only with --yes.", WRONG, json=json)
    typer.confirm(f"Delete for good: {names}?", abort=True)


def prune(data_dir: DataDir = None, json: Json = False) -> None:
    """Remove what dead owners left; a kept VM of theirs stays, and is stopped."""
    infos = execute(AsyncSmolVM.prune(data_dir=data_dir), json=json)
    if json:
        write_json([asdict(info) for info in infos])
        return
    for info in infos:
        say(f"{info.vm_id} is kept, and stopped." if info.keep else f"{info.vm_id} is removed.")
    if not infos:
        say("There is nothing to prune.")
