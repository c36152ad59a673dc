"""`screenshot` and `vnc`: commands for the desktop of any running VM of this user."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

import typer

from smolvm_async import ConfigError, Screenshot
from smolvm_async.cli.command import DataDir, Json, VMId, execute, running_vm
from smolvm_async.cli.output import out, say, write_bytes, write_json

STDOUT = "-"


def screenshot(
    vm_id: VMId,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file: .png, or another suffix that Pillow knows; - is stdout, as PNG.",
            show_default="ID.png",
        ),
    ] = None,
    display: Annotated[
        str | None,
        typer.Option(metavar="ID", help="QEMU's id of a display adapter, if not the VM's own."),
    ] = None,
    head: Annotated[int, typer.Option(help="The number of an output of the display adapter.")] = 0,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Take a picture of a VM's screen."""
    path = f"{vm_id}.png" if output is None else output
    if path == STDOUT and (json or out.is_terminal):
        reader = "the JSON" if json else "the terminal"
        raise typer.BadParameter(f"stdout is used by {reader}: pass a file", param_hint="--output")

    async def work() -> Screenshot:
        async with running_vm(vm_id, data_dir) as vm:
            picture = await vm.screenshot(display=display, head=head)
        if path == STDOUT:
            write_bytes(picture.png)
        else:
            picture.save(path)
        return picture

    picture = execute(work(), json=json)
    if json:
        write_json(
            {
                "vm_id": vm_id,
                "path": path,
                "width": picture.width,
                "height": picture.height,
                "timestamp": picture.timestamp,
                "elapsed": picture.elapsed,
            }
        )
    elif path != STDOUT:
        say(f"{path}: {picture.width}x{picture.height}")


def vnc(
    vm_id: VMId,
    kind: Annotated[
        Literal["loopback", "unix"] | None,
        typer.Option(
            help="Start again, with a new password, on a port of 127.0.0.1 or on a socket.",
            show_default="loopback, if VNC is off",
        ),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Turn the VNC server off.")] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Turn on a VM's VNC server if it is off, and show how to connect."""
    if off and kind is not None:
        raise typer.BadParameter("pass either --off or --kind", param_hint="--off, --kind")

    async def work() -> str | None:
        async with running_vm(vm_id, data_dir) as vm:
            if off:
                await vm.vnc.stop()
                return None
            if kind is not None:
                return await vm.vnc.start(kind)
            try:
                return await vm.vnc.url()
            except ConfigError:
                return await vm.vnc.start()

    url = execute(work(), json=json)
    if json:
        write_json({"vm_id": vm_id, "url": url})
    elif url is None:
        say(f"The VNC server of {vm_id} is off.")
    else:
        say(_directions(url))


def _directions(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "vnc":
        here, there = f"127.0.0.1::{parts.port}", f"127.0.0.1:{parts.port}"
    else:
        here = there = shlex.quote(unquote(parts.path, errors="surrogateescape"))
    return (
        f"{url}\n"
        f"Here:           vncviewer {here}\n"
        f"From a laptop:  ssh -L 5901:{there} THIS-HOST, and then: vncviewer 127.0.0.1::5901\n"
        f"Password:       {parts.password}"
    )
