"""`info`: facts about the operating system in a VM of any process."""

from __future__ import annotations

from smolvm_async import GuestInfo
from smolvm_async.cli.command import DataDir, Json, VMId, execute, running_vm
from smolvm_async.cli.output import in_units, say, write_json


def info(vm_id: VMId, data_dir: DataDir = None, json: Json = False) -> None:
    """Show facts about the operating system in a VM of any process, as the guest tells them."""

    async def work() -> GuestInfo:
        async with running_vm(vm_id, data_dir, tell_pause=True) as vm:
            return await vm.guest_info()

    facts = execute(work(), json=json)
    if json:
        disks = None if facts.disks is None else [disk._asdict() for disk in facts.disks]
        write_json({"vm_id": vm_id, **facts._asdict(), "disks": disks})
        return
    for name, value in facts._replace(disks=None)._asdict().items():
        if value not in (None, ()):
            shown = ", ".join(value) if isinstance(value, tuple) else value
            say(f"{name.replace('_', ' ')}: {shown}")
    for disk in facts.disks or ():
        sizes = ["?" if size is None else in_units(size) for size in (disk.used, disk.total)]
        say(f"disk {disk.mount_point}: {' of '.join(sizes)}, {disk.file_system or '?'}")
