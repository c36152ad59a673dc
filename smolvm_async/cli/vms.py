"""`list`, `stop`, `pause`, `resume`, `delete` and `prune`: commands for VMs of all processes."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated

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
    labels_given,
    no_such_vm,
    running_vm,
)
from smolvm_async.cli.output import (
    busy,
    describe_ending,
    ending_fields,
    say,
    show_infos,
    write_json,
)


def list_vms(
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Show only VMs with this label; may be given several times.",
        ),
    ] = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Show the VMs of this user: running, kept and orphaned.

    RESIDENT is the memory of the host that a VM uses now, PROCESSORS the number of the host's
    processors that it has used on average.
    """
    labels = labels_given(label)
    infos = execute(AsyncSmolVM.list(labels=labels, data_dir=data_dir), json=json)
    if json:
        write_json([asdict(info) for info in infos])
    elif infos:
        show_infos(VMInfo, infos)
    else:
        say("There are no VMs with these labels." if labels else "There are no VMs.")


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


def pause(vm_id: VMId, data_dir: DataDir = None, json: Json = False) -> None:
    """Stop the processors of a VM of any process, until resume.

    Its commands and file transfers wait; keyboard and mouse are refused.
    """
    _change(vm_id, data_dir, AsyncSmolVM.pause, "is paused", json=json)


def resume(vm_id: VMId, data_dir: DataDir = None, json: Json = False) -> None:
    """Let the processors of a paused VM run again, and set the clock of the guest."""
    _change(vm_id, data_dir, AsyncSmolVM.resume, "runs", json=json)


def _change(
    vm_id: str,
    data_dir: str | None,
    change: Callable[[AsyncSmolVM], Awaitable[None]],
    done: str,
    *,
    json: bool,
) -> None:
    async def work() -> Status:
        async with running_vm(vm_id, data_dir) as vm:
            await change(vm)
            return vm.status

    status = execute(work(), json=json)
    if json:
        write_json({"vm_id": vm_id, "status": status})
    else:
        say(f"{vm_id} {done}.")


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
    warm: Annotated[
        bool,
        typer.Option(
            "--warm",
            help="Also remove the cached snapshots from which the built-in Debian starts; the next "
            "start makes its snapshot again.",
        ),
    ] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Remove VMs whose owners have died. Kept VMs stay and become stopped.

    VMs of other hosts that share the directory stay as they are.
    """
    pruning = AsyncSmolVM.prune(data_dir=data_dir, gone_host=gone_host, warm=warm)
    infos = execute(pruning, json=json)
    if json:
        write_json([asdict(info) for info in infos])
        return
    for info in infos:
        kept = f"{info.vm_id} is kept; its status is now stopped."
        say(kept if info.keep else f"Removed {info.vm_id}.")
    if warm:
        say("Removed the snapshots of ready guests.")
    elif not infos:
        say("Nothing to remove.")
