"""Hold VMs: run each VM until a signal or its end, and show every event."""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import asdict, replace
from typing import NamedTuple

from smolvm_async import (
    AsyncSmolVM,
    BootState,
    BootStateChanged,
    EventStream,
    NetworkDenied,
    Progress,
)
from smolvm_async.cli.background import Background
from smolvm_async.cli.command import Interrupts
from smolvm_async.cli.exec import GuestCommand
from smolvm_async.cli.output import (
    describe_ending,
    ending_fields,
    say,
    write_json,
    write_nowhere,
)
from smolvm_async.config.options import make_data_dir
from smolvm_async.foundation.tasks import end_tasks
from smolvm_async.state.names import OWNER_LOG
from smolvm_async.state.status import ACTIVE


class Feed(NamedTuple):
    """The output of events as they happen. If the reader of the output is gone, stop the VM.

    Attributes:
        data_dir: The value of `--data-dir`.
        tenths: For each download, the last tenth that was shown.
        background: This process, if it leaves the terminal when the VM is ready.
        command: A command to run then; the VM ends with it.
    """

    json: bool
    interrupts: Interrupts
    data_dir: str | None
    tenths: dict[str, int]
    background: Background | None
    command: GuestCommand | None

    @classmethod
    def make(
        cls,
        data_dir: str | None,
        *,
        json: bool,
        background: Background | None = None,
        command: GuestCommand | None = None,
    ) -> Feed:
        """Return a feed whose first signal does not cancel the command, except in the background.

        There, the first signal cancels the command until the VM is ready.
        """
        interrupts = Interrupts(spare_first=background is None)
        return cls(json, interrupts, data_dir, {}, background, command)

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
        """Write a progress step, except boot states: `tell_events()` writes more details of these.

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

    async def tell_started(self, vm: AsyncSmolVM) -> None:
        """Write that the VM runs. In the background, wait until it is ready; leave the terminal."""
        vm_id, accelerator = vm.vm_id, vm.accelerator
        if self.background is None:
            text = f"{vm_id} runs under {accelerator}; Ctrl-C powers it down."
            self.tell("started", text, vm_id=vm_id, accelerator=accelerator)
            return
        await vm.wait_for(BootState.READY)
        self.background.restore_stdout()
        self.tell("detached", vm_id, vm_id=vm_id, accelerator=accelerator)
        self.background.leave_terminal(make_data_dir(self.data_dir) / vm_id / OWNER_LOG)
        self.interrupts.spare_first = True

    async def run_command(self, vm: AsyncSmolVM) -> None:
        """Run the command, and write its output and exit code; without one, wait for ever."""
        if self.command is None:
            await asyncio.Event().wait()
        else:
            code = await self.command.run_in_background(vm)
            text = f"The command has ended with exit code {code}."
            self.tell("command_ended", text, vm_id=vm.vm_id, exit_code=code)

    async def tell_events(self, vm_id: str, events: EventStream) -> None:
        """Write the boot states, and the refusals of the network policy, until the VM ends."""
        async for event in events:
            if isinstance(event, BootStateChanged):
                self.tell_state(vm_id, event)
            elif isinstance(event, NetworkDenied):
                self.tell("network_denied", f"{vm_id}: {event}", **event.data, vm_id=vm_id)

    def tell_state(self, vm_id: str, event: BootStateChanged) -> None:
        """Write a boot state."""
        fields = {"elapsed": event.elapsed, "evidence": event.evidence, "vm_id": vm_id}
        text = _line(event.elapsed, event.state, event.evidence)
        self.tell("boot_state", text, state=event.state, **fields)


def _line(elapsed: float, step: str, text: str) -> str:
    return f"{elapsed:8.2f} s  {step:<16}  {text}"


async def hold(vm: AsyncSmolVM, timeout: float | None, feed: Feed) -> None:
    """Start the VM unless it runs, and hold the VM until the first signal or its end.

    Args:
        timeout: Seconds for the guest to power down; `None` means the VM's own.
    """
    try:
        await _hold(vm, timeout, feed)
    finally:
        await _tell_if_kept(vm, feed)


async def _hold(vm: AsyncSmolVM, timeout: float | None, feed: Feed) -> None:
    events = vm.events()
    showing = asyncio.ensure_future(feed.tell_events(vm.vm_id, events))
    asked = asyncio.ensure_future(feed.interrupts.first.wait())
    try:
        if vm.status in ACTIVE:  # a clone has been in this state since before its first event
            feed.tell_state(vm.vm_id, await vm.wait_for(BootState.FIRMWARE))
        async with vm:
            await feed.tell_started(vm)
            working = asyncio.ensure_future(feed.run_command(vm))
            try:
                # `showing` ends when the VM has ended; a crash cancels this block.
                ends = {asked, showing, working}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if not (asked.done() or showing.done()):
                    await working
            finally:
                await end_tasks(working)
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


async def _tell_if_kept(vm: AsyncSmolVM, feed: Feed) -> None:
    vm_id = vm.vm_id
    for info in await AsyncSmolVM.list(data_dir=feed.data_dir):
        if info.vm_id == vm_id and info.keep and info.owner is None:
            place = f" --data-dir {shlex.quote(feed.data_dir)}" if feed.data_dir else ""
            feed.tell(
                "kept",
                f"{vm_id} is kept. To boot it again: smolvm-async run --id {vm_id}{place}\n"
                f"To delete it: smolvm-async delete {vm_id}{place}",
                vm_id=vm_id,
            )
