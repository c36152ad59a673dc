"""`events`: what happens to a VM of any process."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated

import typer

from smolvm_async import BootState, Event, NetworkDenied, Trouble
from smolvm_async.cli.command import DataDir, Json, VMId, execute, running_vm
from smolvm_async.cli.output import say, write_json


def events(
    vm_id: VMId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show new events, until the VM ends.")
    ] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Show the boot state of a VM of any process, and the events that follow.

    Among them: changes of the boot state, QEMU's events such as RESET and SHUTDOWN, troubles, and
    refusals of the network policy.
    """

    def show(event: Event) -> None:
        if json:
            write_json({"vm_id": vm_id, **asdict(event)})
            return
        time = datetime.fromtimestamp(event.timestamp).astimezone().isoformat(" ", "seconds")
        say(f"{time}  {event.name}  {_details(event)}".rstrip())

    async def work() -> None:
        async with running_vm(vm_id, data_dir) as vm:
            stream = vm.events()
            show(await vm.wait_for(BootState.LAUNCHING))
            if follow:
                async for event in stream:
                    show(event)
            stream.close()

    execute(work(), json=json)


def _details(event: Event) -> str:
    """Return what an event says, without what each event has."""
    if isinstance(event, NetworkDenied | Trouble):
        return str(event)
    fields = {**asdict(event), **event.data}
    common = ("name", "timestamp", "data")
    return ", ".join(f"{name}={value}" for name, value in fields.items() if name not in common)
