"""`run`: boot an image, run the VM until a signal or its end, and show every event."""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import asdict, replace
from typing import Annotated, Literal, NamedTuple

import typer

from smolvm_async import (
    AsyncSmolVM,
    BootStateChanged,
    ConfigError,
    EventStream,
    Progress,
    VMAlreadyExistsError,
    VMNotFoundError,
)
from smolvm_async.cli.command import (
    DataDir,
    Interrupts,
    Json,
    Timeout,
    complete_vm_id,
    execute,
    find_vm,
)
from smolvm_async.cli.output import (
    busy,
    describe_ending,
    ending_fields,
    say,
    write_json,
    write_nowhere,
)
from smolvm_async.config.checks import AccelName
from smolvm_async.config.options import VMOptions
from smolvm_async.guests import GUESTS, GuestName
from smolvm_async.state.status import ACTIVE

MACHINE = ("memory", "cpus", "accel", "keep", "resolution", "vnc")  # fixed in a kept VM


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
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the VM afterwards, so that it can boot again.")
    ] = False,
    resolution: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="The screen's size.", show_default="1280x800"),
    ] = None,
    vnc: Annotated[
        Literal["loopback", "unix"] | None,
        typer.Option(help="Turn on VNC; 'smolvm-async vnc ID' shows how to connect."),
    ] = None,
    timeout: Timeout = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Boot an image, show the boot states, and run the VM until Ctrl-C.

    The first Ctrl-C (or SIGTERM, or a terminal that closes) powers the guest down; the next signal
    kills the VM at once. Then the VM is deleted, unless it is kept.

    For example:

      smolvm-async run

      smolvm-async run --os linux --id tools --keep

      smolvm-async run ~/win11.qcow2 --os windows --memory 8192

      smolvm-async run ~/win11.qcow2 --os windows --id office --keep

      smolvm-async run --id office

      smolvm-async run s3://bucket/images/debian-12/
    """
    feed = Feed(json, Interrupts(spare_first=True), {})
    options: VMOptions = {
        "os": os,
        "image": image,
        "memory": memory,
        "cpus": cpus,
        "vm_id": vm_id,
        "resolution": resolution,
        "vnc": vnc,
        "data_dir": data_dir,
        "on_progress": feed.on_progress,
    }
    if accel is not None:
        options["accel"] = accel
    if keep:
        options["keep"] = keep
    at_rest = image is None and vm_id is not None and os is None
    given = [name for name in MACHINE if options.get(name) is not None]

    async def boot() -> None:
        if at_rest:
            vm = await _find_at_rest(str(vm_id), data_dir, given, feed)
        else:
            vm = AsyncSmolVM(**options)
        try:
            await _hold(vm, timeout, feed)
        finally:
            await _tell_if_kept(vm.vm_id, data_dir, feed)

    execute(boot(), json=json, interrupts=feed.interrupts)


class Feed(NamedTuple):
    """The output of events as they happen. If the reader of the output is gone, stop the VM.

    Attributes:
        tenths: For each download, the last tenth that was shown.
    """

    json: bool
    interrupts: Interrupts
    tenths: dict[str, int]

    def tell(self, event: str, text: str, **fields: object) -> None:
        """Write an event: its text, or for JSON its name and fields."""
        try:
            if self.json:
                write_json({"event": event, **fields})
            else:
                say(text)
        except OSError:
            write_nowhere()
            self.interrupts.first.set()

    def on_progress(self, progress: Progress) -> None:
        """Write a progress step, except boot states: `tell_boot()` writes more details of these.

        In text output, write a download only at each tenth.
        """
        if not self.json and progress.done and progress.total and progress.rate:
            tenth = 10 * progress.done // progress.total
            if tenth == self.tenths.get(progress.message):
                return
            self.tenths[progress.message] = tenth
            rate = f"{10 * tenth} %, {progress.rate / (1 << 20):.0f} MiB/s"
            progress = replace(progress, message=f"{progress.message}: {rate}")
        if progress.stage != "boot":
            text = _line(progress.elapsed, progress.stage, progress.message)
            self.tell("progress", text, **asdict(progress))

    async def tell_boot(self, events: EventStream) -> None:
        """Write the boot states until the VM ends."""
        async for event in events:
            if isinstance(event, BootStateChanged):
                fields = {"elapsed": event.elapsed, "evidence": event.evidence}
                text = _line(event.elapsed, event.state, event.evidence)
                self.tell("boot_state", text, state=event.state, **fields)


def _line(elapsed: float, step: str, text: str) -> str:
    return f"{elapsed:8.2f} s  {step:<16}  {text}"


async def _find_at_rest(
    vm_id: str, data_dir: str | None, given: list[str], feed: Feed
) -> AsyncSmolVM:
    """Find a kept VM, which has its own settings: none may be `given`."""
    try:
        vm = await find_vm(vm_id, data_dir, on_progress=feed.on_progress)
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
        names = ", ".join(f"--{name}" for name in given)
        raise ConfigError(f"{vm_id} is a kept VM, which has its own settings: leave out {names}.")
    return vm


async def _hold(vm: AsyncSmolVM, timeout: float | None, feed: Feed) -> None:
    feed.tell("starting", f"Starting {vm.vm_id}.", vm_id=vm.vm_id)
    events = vm.events()
    showing = asyncio.ensure_future(feed.tell_boot(events))
    asked = asyncio.ensure_future(feed.interrupts.first.wait())
    try:
        with busy(vm.vm_id, json=feed.json):
            async with vm:
                feed.tell(
                    "started",
                    f"{vm.vm_id} runs under {vm.accelerator}; Ctrl-C powers it down.",
                    vm_id=vm.vm_id,
                    accelerator=vm.accelerator,
                )
                # `showing` ends when the VM has ended; a crash cancels this block.
                await asyncio.wait({asked, showing}, return_when=asyncio.FIRST_COMPLETED)
                if asked.done():
                    feed.tell(
                        "stopping",
                        f"Stopping {vm.vm_id}. Another Ctrl-C kills the VM at once.",
                        signal=feed.interrupts.number.name,
                    )
                report = await vm.stop(timeout)
    except asyncio.CancelledError:
        feed.tell("killed", f"{vm.vm_id} was killed.", vm_id=vm.vm_id)
        raise
    finally:
        asked.cancel()
        events.close()
        await showing
    feed.tell("ended", describe_ending(vm.vm_id, report), **ending_fields(vm.vm_id, report))


async def _tell_if_kept(vm_id: str, data_dir: str | None, feed: Feed) -> None:
    for info in await AsyncSmolVM.list(data_dir=data_dir):
        if info.vm_id == vm_id and info.keep and info.owner is None:
            place = f" --data-dir {shlex.quote(data_dir)}" if data_dir else ""
            feed.tell(
                "kept",
                f"{vm_id} is kept. To boot it again: smolvm-async run --id {vm_id}{place}\n"
                f"To delete it: smolvm-async delete {vm_id}{place}",
                vm_id=vm_id,
            )
