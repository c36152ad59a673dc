"""The options for the network policy, and `network`, which shows or changes it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from smolvm_async import AsyncSmolVM, InternetSettings
from smolvm_async.cli.command import DataDir, Json, VMId, execute, find_vm
from smolvm_async.cli.output import say, write_json
from smolvm_async.config.internet import Mode
from smolvm_async.state.status import ACTIVE

Internet = Annotated[
    Mode | None,
    typer.Option(
        "--internet",
        help="The network policy: the internet and the local network, but not this host; only "
        "what is allowed; or nothing.",
        show_default="open; restricted with --allow-domain or --allow-cidr",
    ),
]
AllowDomain = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A domain name that the guest may reach, or '*.NAME' for all names below it; may be "
        "given several times.",
    ),
]
AllowCIDR = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-cidr",
        metavar="CIDR",
        help="A network that the guest may reach, such as 203.0.113.0/24; may be given several "
        "times.",
    ),
]
AllowHostPort = Annotated[
    list[int] | None,
    typer.Option(
        metavar="PORT",
        help="A port of this host's loopback that the guest may reach, as 10.0.2.2:PORT; may be "
        "given several times.",
    ),
]


def settings_given(
    mode: Mode | None,
    domains: list[str] | None,
    cidrs: list[str] | None,
    ports: list[int] | None,
) -> dict[str, Any] | None:
    """Return `internet_settings=`; `None` if no option for the network policy was given."""
    given = {
        "mode": mode,
        "allowed_domains": domains,
        "allowed_cidrs": cidrs,
        "allowed_host_ports": ports,
    }
    return {name: value for name, value in given.items() if value} or None


def network(
    vm_id: VMId,
    internet: Internet = None,
    allow_domain: AllowDomain = None,
    allow_cidr: AllowCIDR = None,
    allow_host_port: AllowHostPort = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Show the network policy of a VM of any process, or replace it by the given options.

    Connections of a running guest that the new policy does not allow end.

    For example: smolvm-async network office --allow-domain pypi.org --allow-domain '*.debian.org'
    """
    given = settings_given(internet, allow_domain, allow_cidr, allow_host_port)

    async def work() -> InternetSettings:
        vm = await find_vm(vm_id, data_dir)
        try:
            if given is not None:
                await vm.set_internet_settings(given)
            return vm.internet_settings
        finally:
            await leave(vm)

    settings = execute(work(), json=json)
    if json:
        write_json(settings.model_dump())
        return
    say(f"The network of {vm_id}: {settings.mode}.")
    for name, values in settings:
        if name != "mode" and values:
            say(f"{name.replace('_', ' ')}: {', '.join(map(str, values))}")


async def leave(vm: AsyncSmolVM) -> None:
    """Detach from a VM that runs in another process."""
    if vm.status in ACTIVE:
        await vm.detach()
