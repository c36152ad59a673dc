"""`mcp`: serve sandboxes to an agent over the Model Context Protocol."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from smolvm_async.cli.account import HINT, Key, PasswordFile, User, password_given
from smolvm_async.cli.command import DataDir, execute
from smolvm_async.cli.internet import AllowCIDR, AllowDomain, AllowHostPort, settings_given
from smolvm_async.config.checks import AccelName
from smolvm_async.config.internet import Mode
from smolvm_async.guests import Channel

Internet = Annotated[
    Mode | None,
    typer.Option(
        "--internet",
        help="The network policy of all sandboxes: the internet and the local network, but not "
        "this host; only what is allowed; or nothing.",
        show_default="off; restricted with an --allow option",
    ),
]


def mcp(
    max_sandboxes: Annotated[int, typer.Option(min=1, help="Sandboxes at the same time.")] = 8,
    max_memory: Annotated[
        int, typer.Option(metavar="MIB", min=1, help="Memory of all sandboxes together.")
    ] = 8192,
    max_snapshots: Annotated[int, typer.Option(min=0, help="Snapshots at the same time.")] = 8,
    lifetime: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="A sandbox is deleted after this time.")
    ] = 3600.0,
    command_time: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="The longest timeout of a command.")
    ] = 600.0,
    linux_image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="A Linux image, not the built-in Debian.")
    ] = None,
    windows_image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Offer Windows sandboxes from this image.")
    ] = None,
    channel: Annotated[
        Channel | None,
        typer.Option(
            help="The way to run commands in the images: SSH, or the QEMU guest agent.",
            show_default="ssh; agent for Windows",
        ),
    ] = None,
    user: User = None,
    key: Key = None,
    password_file: PasswordFile = None,
    snapshot: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Offer a snapshot of yours; may be given several times."),
    ] = None,
    accel: Annotated[AccelName, typer.Option(help="The accelerator of QEMU.")] = "auto",
    internet: Internet = None,
    allow_domain: AllowDomain = None,
    allow_cidr: AllowCIDR = None,
    allow_host_port: AllowHostPort = None,
    data_dir: DataDir = None,
) -> None:
    """Serve sandboxes to an agent, over the Model Context Protocol on stdin and stdout.

    An MCP client starts this command. All sandboxes end with the client's session. Without a
    network option, sandboxes have no network.

    For example, in a client's settings: {"command": "smolvm-async", "args": ["mcp"]}
    """
    from smolvm_async.agents.sandboxes import SessionLimits
    from smolvm_async.agents.server import serve

    if password_file == "-":
        raise typer.BadParameter("pass a file: stdin has the protocol", param_hint=HINT)
    account = {"user": user, "key": key, "password": password_given(password_file)}
    settings = settings_given(internet, allow_domain, allow_cidr, allow_host_port)
    # Never `open` by default: elsewhere, an allowed port of the host alone leaves the network open.
    settings = {"mode": "restricted", **settings} if settings else {"mode": "off"}
    images = {"linux": linux_image, "windows": windows_image}
    options: dict[str, Any] = {"accel": accel, "data_dir": data_dir}
    options["internet_settings"], options["channel"] = settings, channel

    async def work() -> None:
        limits = SessionLimits(
            max_sandboxes=max_sandboxes,
            max_memory=max_memory,
            max_snapshots=max_snapshots,
            lifetime=lifetime,
            command_time=command_time,
            images={guest: image for guest, image in images.items() if image is not None},
            snapshots=tuple(snapshot or ()),
            options=options,  # type: ignore[arg-type]  # typer has checked them
            account=account,  # type: ignore[arg-type]
        )
        await serve(limits)

    execute(work(), json=False)
