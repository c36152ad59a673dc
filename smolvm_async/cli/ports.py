"""`forward` and `ssh-config`: ways to a running VM's network for programs of this host."""

from __future__ import annotations

from typing import Annotated

import typer

from smolvm_async import Access, PortForward
from smolvm_async.cli.command import DataDir, Json, VMId, execute, running_vm
from smolvm_async.cli.output import say, write_json
from smolvm_async.config.options import make_data_dir
from smolvm_async.state.names import SSH_KEY


def forward(
    vm_id: VMId,
    guest_port: Annotated[
        int | None,
        typer.Argument(
            metavar="[PORT]", help="A TCP port of the guest. Without it, show all forwarded ports."
        ),
    ] = None,
    host_port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="The port of 127.0.0.1.", show_default="a free port"),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Stop forwarding --host-port.")] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Forward a port of 127.0.0.1 to a port of a VM, until the VM ends.

    For example:

      smolvm-async forward office 8000 --host-port 8080

      smolvm-async forward office --host-port 8080 --remove
    """
    if remove and (host_port is None or guest_port is not None):
        raise typer.BadParameter("pass --host-port, and no PORT", param_hint="--remove")

    async def work() -> list[PortForward]:
        async with running_vm(vm_id, data_dir) as vm:
            if remove and host_port is not None:
                await vm.unexpose_local(host_port)
            elif guest_port is not None:
                port = await vm.expose_local(guest_port, host_port)
                return [PortForward(guest_port, port)]
            return list(await vm.list_port_forwards())

    forwards = execute(work(), json=json)
    if json:
        write_json([each._asdict() for each in forwards])
        return
    for each in forwards:
        say(f"127.0.0.1:{each.host_port} -> {vm_id}:{each.guest_port}")
    if not forwards:
        say(f"No ports of {vm_id} are forwarded.")


def ssh_config(vm_id: VMId, data_dir: DataDir = None, json: Json = False) -> None:
    """Write the configuration with which ssh, scp, rsync and VS Code reach a VM.

    It holds until the VM ends, and needs OpenSSH 8.5 or newer. A Windows VM needs --password-file
    or --key; with a password, which is not in the configuration, the programs ask for it.

    For example:

      smolvm-async ssh-config office > office.conf

      ssh -F office.conf office

      rsync -e 'ssh -F office.conf' -a src office:/root/
    """

    async def work() -> Access:
        async with running_vm(vm_id, data_dir) as vm:
            access = await vm.ssh_access()
            if not access.host_key:  # of a Windows image: the first login shows it
                await vm.wait_for("ready")
                access = await vm.ssh_access()
            return access

    access = execute(work(), json=json)
    key = access.key_file or str(make_data_dir(data_dir) / vm_id / SSH_KEY)
    kind = access.host_key.partition(" ")[0]
    settings = {
        "HostName": "127.0.0.1",
        "Port": access.port,
        "User": access.user,
        **(
            {"IdentityFile": f'"{key}"', "IdentitiesOnly": "yes"}
            if access.private_key
            else {"PubkeyAuthentication": "no"}
        ),
        "HostKeyAlias": vm_id,
        # ssh would prefer a key of another kind, which is not known, if the server has one.
        "HostKeyAlgorithms": "rsa-sha2-512,rsa-sha2-256" if kind == "ssh-rsa" else kind,
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": "none",
        "GlobalKnownHostsFile": "none",
        "KnownHostsCommand": f"/bin/echo {vm_id} {access.host_key}",
    }
    if json:
        write_json({"Host": vm_id, **settings})
    else:
        lines = (f"  {name} {value}" for name, value in settings.items())
        say("\n".join([f"Host {vm_id}", *lines]))
