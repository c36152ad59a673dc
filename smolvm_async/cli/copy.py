"""`cp`: files and directories into a VM and out of it."""

from __future__ import annotations

from typing import Annotated

import typer

from smolvm_async.cli.command import DataDir, Json, execute, running_vm
from smolvm_async.cli.output import say, transfer, write_json


def cp(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A path, or ID:PATH.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A path, or ID:PATH.")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Copy a file, or a directory with its contents, into a VM or out of it.

    One of the paths is ID:PATH, with an absolute PATH in the VM. If TARGET is a directory or ends
    with a slash, the copy goes into it. Until a copy is complete, it has a temporary name.

    For example:

      smolvm-async cp src office:/root/work

      smolvm-async cp office:/var/log/dpkg.log .

      smolvm-async cp setup.exe windows:C:/Temp/
    """
    (from_vm, source_path), (to_vm, target_path) = _parts(source), _parts(target)
    vm_id = from_vm or to_vm
    if vm_id is None or (from_vm and to_vm):
        raise typer.BadParameter("pass exactly one path in a VM, as ID:PATH", param_hint="SOURCE")

    async def work() -> str:
        async with running_vm(vm_id, data_dir, tell_pause=True) as vm:
            if to_vm:
                return await vm.upload_file(source_path, target_path, on_progress=on_progress)
            return str(await vm.download_file(source_path, target_path, on_progress=on_progress))

    with transfer(f"copying {source_path}", json=json) as on_progress:
        path = execute(work(), json=json)
    if json:
        write_json({"vm_id": vm_id, "path": path})
    else:
        say(f"{to_vm}:{path}" if to_vm else path)


def _parts(text: str) -> tuple[str | None, str]:
    """Return the VM's id and the path; a path of this host has no id.

    As in docker, a path of this host with a colon needs a slash before the colon: `./a:b`.
    """
    vm_id, colon, path = text.partition(":")
    return (vm_id, path) if colon and vm_id and "/" not in vm_id else (None, text)
