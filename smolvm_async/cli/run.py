"""`run`: boot an image, and run the VM until its end, for one command, or in the background."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Annotated, Literal

import typer

from smolvm_async import (
    AsyncSmolVM,
    ConfigError,
    GuestProcess,
    VMAlreadyExistsError,
    VMNotFoundError,
    VMNotRunningError,
)
from smolvm_async.cli.account import Key, PasswordFile, User, password_given
from smolvm_async.cli.background import Background
from smolvm_async.cli.command import (
    TTL,
    VNC,
    DataDir,
    Detach,
    IdleTimeout,
    Json,
    Keep,
    Label,
    Mount,
    Timeout,
    complete_vm_id,
    end_told,
    execute,
    find_vm,
    labels_given,
)
from smolvm_async.cli.exec import (
    Env,
    GuestCommand,
    Interactive,
    Tty,
    Workdir,
    exit_with,
    variables,
)
from smolvm_async.cli.hold import Feed, hold
from smolvm_async.cli.internet import (
    AllowCIDR,
    AllowDomain,
    AllowHostPort,
    Internet,
    settings_given,
)
from smolvm_async.cli.output import busy, err
from smolvm_async.config.checks import AccelName
from smolvm_async.config.options import VMOptions
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.guests import GUESTS, Channel, GuestName
from smolvm_async.state.status import ACTIVE

# Fixed in a kept VM.
MACHINE = (
    *("memory", "cpus", "accel", "channel", "user", "key", "keep", "boot", "resolution", "vnc"),
    *("ttl", "idle_timeout"),
)


def _defaults(field: str) -> str:
    """Return each guest OS's default for an option, for the option's help."""
    return ", ".join(f"{guest.title} {getattr(guest, field)}" for guest in GUESTS.values())


def run(
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="[IMAGE]",
            help="A qcow2 to start from, or s3://BUCKET/PREFIX/. By default, the built-in Debian; "
            "with only --id, the kept VM with this id boots again.",
        ),
    ] = None,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND", help="A command, and its arguments."),
    ] = None,
    os: Annotated[
        GuestName | None,
        typer.Option(help="The guest OS; needed for a qcow2."),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(metavar="MIB", help="Memory.", show_default=_defaults("default_memory")),
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(help="Cores.", show_default=_defaults("default_cpus"))
    ] = None,
    vm_id: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="ID",
            help="The VM's id.",
            show_default="vm- and 8 hex digits",
            autocompletion=complete_vm_id,
        ),
    ] = None,
    accel: Annotated[
        AccelName | None,
        typer.Option(help="The accelerator of QEMU.", show_default="auto"),
    ] = None,
    channel: Annotated[
        Channel | None,
        typer.Option(
            help="The way to run commands: SSH, or the QEMU guest agent in the image.",
            show_default="ssh; agent for Windows",
        ),
    ] = None,
    user: User = None,
    key: Key = None,
    password_file: PasswordFile = None,
    keep: Keep = False,
    boot: Annotated[
        Literal["warm", "cold"] | None,
        typer.Option(
            help="Start the built-in Debian from a snapshot of a guest that is ready, or boot it.",
            show_default="warm for the built-in Debian",
        ),
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="The screen's size.", show_default="1280x800"),
    ] = None,
    vnc: VNC = None,
    mount: Mount = None,
    internet: Internet = None,
    allow_domain: AllowDomain = None,
    allow_cidr: AllowCIDR = None,
    allow_host_port: AllowHostPort = None,
    label: Label = None,
    ttl: TTL = None,
    idle_timeout: IdleTimeout = None,
    env: Env = None,
    workdir: Workdir = None,
    tty: Tty = False,
    interactive: Interactive = False,
    detach: Detach = False,
    remove: Annotated[
        bool, typer.Option("--rm", help="For users of docker: without --keep, no VM is kept.")
    ] = False,
    timeout: Timeout = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Start a VM from an image, and run it until Ctrl-C, or for one COMMAND, or in the background.

    The first Ctrl-C (or SIGTERM, or a terminal that closes) powers the guest down; the next signal
    kills the VM at once. Then the VM is deleted, unless it is kept.

    With a COMMAND, the VM is there for the COMMAND only, which runs as by exec: its streams pass
    through, and the exit code is the COMMAND's. With --tty alone, the COMMAND is a login shell.

    With --detach, the VM runs until stop or delete, or until its COMMAND ends, and is independent
    of this terminal; logs --source owner shows the messages, and the COMMAND's output and exit
    code: afterwards, too, with --keep.

    For example:

      smolvm-async run

      smolvm-async run --os linux --id tools --keep

      smolvm-async run ~/win11.qcow2 --os windows --memory 8192

      smolvm-async run ~/win11.qcow2 --os windows --id office --keep

      smolvm-async run --id office

      smolvm-async run ~/win11.qcow2 --os windows --user me --password-file -

      smolvm-async run --ttl 3600 --idle-timeout 300 --label task=42

      smolvm-async run --mount ~/project --mount ~/data:/mnt/data:rw

      smolvm-async run --allow-domain pypi.org --allow-domain '*.pythonhosted.org'

      smolvm-async run s3://bucket/images/debian-12/

      smolvm-async run -- python3 -c 'print(1)'

      smolvm-async run ~/win11.qcow2 --os windows -- cmd /c ver

      smolvm-async run -d --memory 1024

      smolvm-async run -d --id build --keep -- make test
    """
    if remove and keep:
        raise typer.BadParameter("pass either --rm or --keep", param_hint="--rm, --keep")
    guest_command = None
    if command or tty:
        if json:
            raise typer.BadParameter("pass either --json or a COMMAND", param_hint="--json")
        guest_command = GuestCommand(command or [], env, workdir, tty=tty, detach=detach)
    elif workdir is not None:
        raise typer.BadParameter("pass a COMMAND, too", param_hint="--workdir")
    password = password_given(password_file)
    background = Background(json=json) if detach else None
    feed = Feed.make(data_dir, json=json, background=background, command=guest_command)
    options: VMOptions = {
        "os": os,
        "image": image,
        "memory": memory,
        "cpus": cpus,
        "vm_id": vm_id,
        "channel": channel,
        "user": user,
        "key": key,
        "password": password,
        "boot": boot,
        "resolution": resolution,
        "vnc": vnc,
        "mounts": mount or (),
        "internet_settings": settings_given(internet, allow_domain, allow_cidr, allow_host_port),
        "labels": labels_given(label) or None,
        "ttl": ttl,
        "idle_timeout": idle_timeout,
        "data_dir": data_dir,
    }
    if accel is not None:
        options["accel"] = accel
    if keep:
        options["keep"] = keep
    at_rest = image is None and vm_id is not None and os is None
    given = [name for name in MACHINE if options.get(name) is not None]
    given += [name for name, values in (("mount", mount), ("label", label)) if values]

    async def make(on_progress: ProgressCallback) -> AsyncSmolVM:
        if not at_rest:
            options["on_progress"] = on_progress
            return AsyncSmolVM(**options)
        vm = await _find_at_rest(str(vm_id), data_dir, password, given, on_progress)
        if (settings := options["internet_settings"]) is not None:
            await vm.set_internet_settings(settings)
        return vm

    if guest_command is not None and not detach:
        exit_with(guest_command, _for_a_command(guest_command, make, timeout))
    if env and guest_command is None:
        options["env"] = variables(env)

    async def work() -> None:
        vm = await make(feed.on_progress)
        feed.tell("starting", f"Starting {vm.vm_id}.", vm_id=vm.vm_id)
        with busy(vm.vm_id, json=json or detach):  # no thread outlives the terminal
            await hold(vm, timeout, feed)

    execute(work(), json=json, interrupts=feed.interrupts)


@asynccontextmanager
async def _for_a_command(
    command: GuestCommand,
    make: Callable[[ProgressCallback], Awaitable[AsyncSmolVM]],
    timeout: float | None,
) -> AsyncIterator[GuestProcess]:
    """Run a command in a VM of its own during the block; show the VM's progress on stderr."""
    async with AsyncExitStack() as stack:
        with busy("Starting a VM", json=False, console=err) as show:
            vm = await make(lambda step: show(step.message))
            with suppress(VMNotRunningError):  # tell before the boot what the guest cannot do
                await command.open(vm)
            await stack.enter_async_context(vm)
            await stack.enter_async_context(end_told(vm))
            process = await command.open(vm)
        async with process:
            yield process
        await vm.stop(timeout)


async def _find_at_rest(
    vm_id: str,
    data_dir: str | None,
    password: str | None,
    given: list[str],
    on_progress: ProgressCallback,
) -> AsyncSmolVM:
    """Find a kept VM, which has its own settings: none may be `given`."""
    try:
        vm = await find_vm(vm_id, data_dir, on_progress=on_progress, password=password)
    except VMNotFoundError as error:
        raise VMNotFoundError(
            f"{error.message} To make a new VM with this id, pass an IMAGE, or --os linux for the "
            "built-in Debian."
        ) from None
    if vm.status in ACTIVE:
        await vm.detach()
        raise VMAlreadyExistsError(
            f"{vm_id} is already running: to see its console, run "
            f"smolvm-async logs --follow {vm_id}."
        )
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{vm_id} is a kept VM, which has its own settings: leave out {names}.")
    return vm
