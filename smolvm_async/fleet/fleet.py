"""The public class: a fleet, its block, its VMs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
    Sequence,
    Sized,
)
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from smolvm_async.errors import ConfigError, HostError, MemberFailedError
from smolvm_async.events import BootState
from smolvm_async.fleet.choices import check_count, check_on_error, check_until, check_work
from smolvm_async.fleet.jobs import Items, Job, Jobs, OnError, R, T
from smolvm_async.fleet.member import WAITING, FleetStatus, Gate, Member
from smolvm_async.fleet.memory import LEDGER
from smolvm_async.fleet.template import Template
from smolvm_async.shielding import in_thread, settle
from smolvm_async.vm import AsyncSmolVM

LIVE_PER_PROCESSOR = 16  # guests that mostly wait; 32 on two cores were measured
BOOTING_PER_PROCESSOR = 1  # more take longer each, and no less together (under TCG)


class Fleet:
    """Many VMs at once.

    ::

        async with Fleet({"memory": 256}, size=20) as fleet:
            async for vm in fleet:
                print((await vm.run("uname -a")).stdout)

        async with Fleet() as fleet:
            async for result in fleet.map(job, items):
                ...

    Entering it starts `size` VMs, as many at a time as the machine takes; leaving it, in any way,
    kills and deletes them. Memory is promised to one VM at a time, in the order of asking, for all
    fleets of the process.

    Args:
        template: The arguments of `AsyncSmolVM` for each; `vm_id` and `keep` cannot be among them.
        size: How many VMs to start when it is entered, and how many `map()` uses at most; without
            it, only `map()` starts any.
        until: The boot state that a VM is handed over at: `"ready"`, `"operating_system"` or
            `"firmware"`.
        max_booting: How many may boot at once; by default as many as there are processors, or all
            if `until="firmware"`.
        max_live: How many may live at once; by default 16 for each processor, or `size`.
        on_error: `"raise"`: a VM that fails cancels the block, which raises an `ExceptionGroup` of
            `MemberFailedError`s. `"collect"`: the others go on, and `failures` tells.

    Raises:
        ConfigError, HostError: An argument is wrong, or the host lacks something; see
            `AsyncSmolVM`. Nothing was created.
    """

    def __init__(
        self,
        template: Mapping[str, Any] | None = None,
        *,
        size: int | None = None,
        until: BootState | str = BootState.READY,
        max_booting: int | None = None,
        max_live: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self._template = Template(template)
        self._size = 0 if size is None else check_count("size", size)
        self._until = check_until(until)
        processors = len(os.sched_getaffinity(0))
        most = max(self._size, LIVE_PER_PROCESSOR * processors)
        self._max_live = most if max_live is None else check_count("max_live", max_live)
        booting = BOOTING_PER_PROCESSOR * processors
        if self._until is BootState.FIRMWARE:
            # What has been handed over boots on: a turn would end when the work only begins, and
            # the next VM be spawned beside it. 16 at once are there in a third of the time.
            booting = self._max_live
        self._max_booting = (
            booting if max_booting is None else check_count("max_booting", max_booting)
        )
        self._on_error = check_on_error(on_error)
        self._gate: Gate
        self._members: list[Member] = []  # those that it began with
        self._hired: set[Member] = set()  # those of map() that are not over
        self._gone = self._lost = 0  # of map()'s
        self._calls: WeakSet[Jobs[Any, Any]] = WeakSet()
        self._news = asyncio.Event()
        self._body: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._cancelled = self._over = False

    @property
    def failures(self) -> Sequence[MemberFailedError]:
        """The VMs, of those that it began with, that did not start or have crashed."""
        return [
            member.error
            for member in self._members
            if member.error is not None and not member.hired
        ]

    def status(self) -> FleetStatus:
        """How many wait, boot and are ready, and how each is doing."""
        members = [*self._members, *self._hired]
        phases = [member.phase for member in members]
        return FleetStatus(
            waiting=sum(phase in WAITING for phase in phases),
            booting=phases.count("booting"),
            ready=phases.count("ready"),
            deleted=phases.count("deleted") + self._gone,
            failed=phases.count("failed") + self._lost,
            members=tuple(member.status() for member in members),
        )

    async def __aenter__(self) -> Self:
        if self._body is not None or self._over:
            raise ConfigError("this Fleet was entered before: make a new one.")
        try:
            await self._template.look()
            await in_thread(self._check_room, self._template.memory)
        except BaseException:
            self._template.close()
            raise
        self._gate = Gate(self._max_live, self._max_booting)
        self._body = asyncio.current_task()
        assert self._body is not None
        self._cancelling = self._body.cancelling()
        self._members = [self._make(self._on_end) for _ in range(self._size)]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        body, self._body, self._over = self._body, None, True
        failures = self.failures if self._on_error == "raise" else []
        try:
            await settle(self._leave())
        finally:
            self._template.close()
        ours = self._cancelled
        if ours and body is not None:
            ours = body.uncancel() <= self._cancelling
        if isinstance(error, asyncio.CancelledError) and not ours:
            return
        if failures and (error is None or ours):
            raise ExceptionGroup(f"{len(failures)} of {self._size} VMs failed", failures) from error

    async def __aiter__(self) -> AsyncIterator[AsyncSmolVM]:
        """The VMs, as they become ready, each once."""
        while waiting := [member for member in self._entered() if not member.handed_over]:
            self._news.clear()
            ready = [member for member in waiting if member.phase == "ready"]
            for member in ready:
                member.handed_over = True
                yield member.vm
            if not ready:
                if all(member.over.done() for member in waiting):
                    return
                await self._news.wait()

    async def all_ready(self) -> Sequence[AsyncSmolVM]:
        """Wait until all of them are ready, or have failed if `on_error="collect"`.

        Raises:
            ConfigError: There are more than may live at once.
        """
        members = self._entered()
        if len(members) > self._max_live:
            raise ConfigError(
                f"all_ready() cannot be: size={self._size} is more than max_live={self._max_live}, "
                "which may live at once; iterate over the fleet, and delete() each when done."
            )
        if members:
            await asyncio.wait([member.ready for member in members])
        for member in members:
            member.handed_over = True
        return [member.vm for member in members if member.phase == "ready"]

    def map(
        self,
        job: Job[T, R],
        items: Iterable[T] | AsyncIterable[T],
        *,
        retries: int = 0,
        reuse: bool = False,
        in_order: bool = False,
        on_error: OnError | None = None,
    ) -> AsyncIterator[R]:
        """Run `await job(vm, item)` for each item, and yield the results.

        A job whose VM crashes is cancelled, and has failed. Whoever does not iterate to the end
        leaves the rest to the end of the fleet's block, or calls `aclose()`.

        Args:
            job: What to do with a VM and an item.
            items: Taken one by one, as there are VMs for them and results are read; they may be
                endless.
            retries: How often a job that has failed is tried again, each time on a fresh VM.
            reuse: Whether a VM does one job after another, instead of a fresh one for each.
            in_order: Whether the results come in the order of the items, instead of as they are
                done.
            on_error: By default that of the fleet. `"raise"`: the first failure cancels the rest.
                `"collect"`: it is raised after all the others' results.

        Raises:
            ExceptionGroup: Of the `JobFailedError`s, from the iteration.
            ConfigError: An argument is wrong, or the fleet was not entered.
        """
        self._entered()
        check_work(job, items, reuse=reuse, in_order=in_order)
        tries = check_count("retries", retries, least=0)
        workers = min(self._size or self._max_live, self._max_live)
        if isinstance(items, Sized):
            workers = min(workers, len(items))
        jobs = Jobs(self._take, job, Items(items), tries, reuse)
        self._calls.add(jobs)
        how = self._on_error if on_error is None else check_on_error(on_error)
        return jobs.results(max(1, workers), in_order, how)

    async def _leave(self) -> None:
        """End what is left of `map()`, and every VM."""
        members = [*self._members, *self._hired]
        await asyncio.gather(
            *(call.end() for call in list(self._calls)), *(member.release() for member in members)
        )

    def _entered(self) -> list[Member]:
        if self._body is None:
            raise ConfigError("the fleet does not run: use async with Fleet(...) as fleet.")
        return self._members

    def _make(self, on_end: Callable[[Member], None]) -> Member:
        member = Member(self._template, self._gate, self._until)
        member.ready.add_done_callback(lambda _: self._news.set())
        member.over.add_done_callback(lambda _: on_end(member))
        return member

    def _take(self) -> Member:
        """A VM for a job: one that the fleet began with, or a new one."""
        for member in self._entered():
            if not member.handed_over and not member.over.done():
                member.handed_over = member.hired = True
                return member
        member = self._make(self._on_leave)
        self._hired.add(member)
        return member

    def _on_end(self, member: Member) -> None:
        self._news.set()
        failed = member.error is not None and not member.hired
        if failed and self._on_error == "raise" and self._body is not None and not self._cancelled:
            self._cancelled = self._body.cancel()

    def _on_leave(self, member: Member) -> None:
        self._hired.discard(member)
        self._gone += member.error is None
        self._lost += member.error is not None

    def _check_room(self, size: int) -> None:
        together = min(self._size, self._max_live)
        capacity = LEDGER.capacity()
        if together * size > capacity:
            raise HostError(
                f"{together} VMs of {size} MiB, with QEMU's own, do not fit: this host can promise "
                f"{capacity} MiB, enough for {capacity // size}. Pass a smaller size= "
                "or memory=, or use map(), which takes what there is."
            )
