"""`events`: what happens to a VM, as it happens."""

from __future__ import annotations

import json as json_module
from datetime import datetime

from smolvm_async import Event, NetworkDenied, Trouble, VMNotRunningError
from smolvm_async.cli.command import DataDir, Json, VMId, execute, find_vm
from smolvm_async.cli.output import say, write_json
from smolvm_async.state.status import ACTIVE


def events(vm_id: VMId, data_dir: DataDir = None, json: Json = False) -> None:
    """Show the events of a VM of any process as they happen, until the VM ends.

    Among them: boot states, QEMU's events, troubles, and refusals of the network policy.
    """

    async def show() -> None:
        vm = await find_vm(vm_id, data_dir)
        if vm.status not in ACTIVE:
            raise VMNotRunningError(f"{vm_id} is {vm.status}, and only a running VM has events.")
        try:
            async for event in vm.events():
                if json:
                    fields = {"event": event.name, "timestamp": event.timestamp}
                    write_json({**fields, "vm_id": vm_id, "data": event.data})
                else:
                    say(_line(event))
        finally:
            await vm.detach()

    execute(show(), json=json)


def _line(event: Event) -> str:
    time = datetime.fromtimestamp(event.timestamp).strftime("%H:%M:%S")
    text = isinstance(event, NetworkDenied | Trouble)
    shown = str(event) if text else json_module.dumps(event.data, default=str)
    return f"{time}  {event.name:<16}  {shown if event.data else ''}".rstrip()
