"""`snapshot` and `fork`: save VMs, and hold VMs that go on from a snapshot or a running VM."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import typer

from smolvm_async import (
    AsyncSmolVM,
    SmolVMError,
    SnapshotInfo,
    SnapshotNotFoundError,
)
from smolvm_async.cli.account import PasswordFile, password_given
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
    VMId,
    execute,
    find_vm,
    labels_given,
    running_vm,
)
from smolvm_async.cli.exec import Env, variables
from smolvm_async.cli.hold import Feed, hold
from smolvm_async.cli.internet import (
    AllowCIDR,
    AllowDomain,
    AllowHostPort,
    Internet,
    settings_given,
)
from smolvm_async.cli.output import busy, in_units, say, show_infos, write_json
from smolvm_async.config.checks import AccelName
from smolvm_async.config.options import CloneOptions, make_data_dir
from smolvm_async.state.snapshots import SNAPSHOTS
from smolvm_async.state.status import ACTIVE

snapshot = typer.Typer(
    name="snapshot",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Save VMs as snapshots, and start VMs from snapshots.",
)


def complete_snapshot(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the snapshots in the data directory whose names begin with `incomplete`."""
    try:
        infos = asyncio.run(AsyncSmolVM.snapshots(data_dir=context.params.get("data_dir")))
    except (SmolVMError, OSError):
        return []
    return [(info.name, info.vm_id) for info in infos if info.name.startswith(incomplete)]


Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="The snapshot's name.", autocompletion=complete_snapshot),
]
Accel = Annotated[
    AccelName | None, typer.Option(help="The accelerator of QEMU.", show_default="the snapshot's")
]


@snapshot.command()
def create(
    vm_id: VMId,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The snapshot's name.")],
    label: Label = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Save a VM of any process as it is: disk, memory, devices, TPM and UEFI variables.

    The VM may run, be paused, or be a kept VM that is stopped. A running VM goes on. The snapshot
    contains the guest's memory, and so its secrets.

    For example: smolvm-async snapshot create office before-the-update --label ticket=17
    """
    labels = labels_given(label)

    async def work() -> SnapshotInfo:
        vm = await find_vm(vm_id, data_dir)
        try:
            return await vm.snapshot(name, labels=labels)
        finally:
            if vm.status in ACTIVE:
                await vm.detach()

    with busy(f"Saving {vm_id}", json=json):
        info = execute(work(), json=json)
    if json:
        write_json(info._asdict())
    else:
        say(f"Snapshot {name} of {vm_id} takes {in_units(info.size)}.")


@snapshot.command("list")
def list_snapshots(data_dir: DataDir = None, json: Json = False) -> None:
    """Show the snapshots of this user, the oldest first."""
    infos = execute(AsyncSmolVM.snapshots(data_dir=data_dir), json=json)
    if json:
        write_json([info._asdict() for info in infos])
    elif infos:
        show_infos(SnapshotInfo, infos)
    else:
        say("There are no snapshots.")


@snapshot.command()
def restore(
    name: Name,
    vm_id: Annotated[
        str | None,
        typer.Option(
            "--id", metavar="ID", help="The VM's id.", show_default="vm- and 8 hex digits"
        ),
    ] = None,
    accel: Accel = None,
    password_file: PasswordFile = None,
    keep: Keep = False,
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
    detach: Detach = False,
    timeout: Timeout = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Start a VM from a snapshot, and run the VM until Ctrl-C, or in the background.

    The guest goes on where it was saved; it boots if its VM was stopped. The snapshot stays. The
    signals and --detach work as for run.
    """
    given = settings_given(internet, allow_domain, allow_cidr, allow_host_port)
    options = _options(vnc, mount, given, label, ttl, idle_timeout, env, data_dir, keep=keep)
    if accel is not None:
        options["accel"] = accel
    options["password"] = password_given(password_file)
    background = Background(json=json) if detach else None
    feed = Feed.make(data_dir, json=json, background=background)
    options |= {"vm_id": vm_id, "on_progress": feed.on_progress}

    async def work() -> None:
        feed.tell("starting", f"Starting a VM from {name}.", snapshot=name)
        with busy(name, json=json or detach):
            try:
                vm = await AsyncSmolVM.from_snapshot(name, **options)
            except SnapshotNotFoundError:
                raise _no_such_snapshot(name) from None
            await hold(vm, timeout, feed)

    execute(work(), json=json, interrupts=feed.interrupts)


@snapshot.command()
def delete(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...", help="The snapshots' names.", autocompletion=complete_snapshot
        ),
    ],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Delete snapshots. The VMs that were started from them stay, and so do other snapshots."""
    names, root = list(dict.fromkeys(names)), make_data_dir(data_dir) / SNAPSHOTS

    async def work() -> None:
        known = {info.name for info in await AsyncSmolVM.snapshots(data_dir=data_dir)}
        for name in names:
            # Before anything is deleted; the list does not have a damaged snapshot.
            if name not in known and not (root / name).is_dir():
                raise _no_such_snapshot(name)
        for name in names:
            await AsyncSmolVM.delete_snapshot(name, data_dir=data_dir)
            if not json:
                say(f"Snapshot {name} is deleted.")

    execute(work(), json=json)
    if json:
        write_json({"deleted": names})


def fork(
    vm_id: VMId,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, max=1000, help="The number of copies.")
    ] = 1,
    keep: Keep = False,
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
    timeout: Timeout = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Start live copies of a running VM of any process, and run the copies until Ctrl-C.

    The VM itself goes on. The signals work as for run.

    For example: smolvm-async fork office -n 4
    """
    feed = Feed.make(data_dir, json=json)
    given = settings_given(internet, allow_domain, allow_cidr, allow_host_port)
    options = _options(vnc, mount, given, label, ttl, idle_timeout, env, data_dir, keep=keep)

    async def work() -> None:
        feed.tell("starting", f"Forking {vm_id}.", vm_id=vm_id, count=count)
        with busy(f"{count} x {vm_id}", json=json):
            async with running_vm(vm_id, data_dir) as vm:
                clones = await vm.fork(count, **options)
            holds = (hold(clone, timeout, feed) for clone in clones)
            ends = await asyncio.gather(*holds, return_exceptions=True)
        for end in ends:
            if end is not None:  # the other clones went on after a crash
                raise end

    execute(work(), json=json, interrupts=feed.interrupts)


def _options(
    vnc: Literal["loopback", "unix"] | None,
    mount: list[str] | None,
    internet: dict[str, Any] | None,
    label: list[str] | None,
    ttl: float | None,
    idle_timeout: float | None,
    env: list[str] | None,
    data_dir: str | None,
    *,
    keep: bool,
) -> CloneOptions:
    """Return the options that a restored VM and a copy have in common."""
    return {
        "keep": keep,
        "vnc": vnc,
        "mounts": mount or (),
        "internet_settings": internet,
        "labels": labels_given(label) or None,
        "ttl": ttl,
        "idle_timeout": idle_timeout,
        "env": variables(env) if env else None,
        "data_dir": data_dir,
    }


def _no_such_snapshot(name: str) -> SnapshotNotFoundError:
    return SnapshotNotFoundError(
        f"there is no snapshot {name!r}: smolvm-async snapshot list shows all snapshots. If they "
        "are not in the default directory, pass --data-dir."
    )
