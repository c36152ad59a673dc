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
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from smolvm_async.errors import ConfigError, HostError, MemberFailedError
from smolvm_async.fleet.checks import check_count, check_on_error, check_until, check_work
from smolvm_async.fleet.jobs import Items, Job, Jobs, OnError, R, T, awaited
from smolvm_async.fleet.member import WAITING, FleetStatus, Gate, Member
from smolvm_async.fleet.memory import LEDGER
from smolvm_async.fleet.template import Template
from smolvm_async.foundation.tasks import in_thread, settle
from smolvm_async.qemu.events import BootState
from smolvm_async.state.record import ACTIVE
from smolvm_async.vm.block import Block
from smolvm_async.vm.vm import AsyncSmolVM

LIVE_PER_PROCESSOR = 16  # guests that mostly wait; 32 on two cores were measured
BOOTING_PER_PROCESSOR = 1  # more take longer each, and no less together (under TCG)


_working_for: ContextVar[tuple[Fleet, ...]] = ContextVar("_working_for", default=())


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
        self._block = Block()
        self._over = False

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
        if self._block.entered or self._over:
            raise ConfigError("this Fleet was entered before: make a new one.")
        try:
            await self._template.look()
            self._check_limit(self._template.most)
            await in_thread(self._check_room, self._template.memory)
        except BaseException:
            self._template.close()
            raise
        self._gate = Gate(self._max_live, self._max_booting)
        self._block.enter()
        self._members = [self._make(self._on_end) for _ in range(self._size)]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over = True
        failures = self.failures if self._on_error == "raise" else []
        told = f"{len(failures)} of {self._size} VMs failed"
        group = ExceptionGroup(told, failures) if failures else None
        try:
            await self._block.leave(settle(self._leave()), error, lambda: group)
        finally:
            self._template.close()

    async def __aiter__(self) -> AsyncIterator[AsyncSmolVM]:
        """The VMs, as they become ready, each once."""
        while waiting := [member for member in self._entered() if not member.handed_over]:
            self._news.clear()
            member = next((member for member in waiting if member.phase == "ready"), None)
            if member is not None:
                member.handed_over = True
                yield member.vm
            elif all(member.over.done() for member in waiting):
                return
            else:
                await self._news.wait()

    async def all_ready(self) -> Sequence[AsyncSmolVM]:
        """Wait until all of them are ready.

        One that fails ends the wait as it ends the block: by a cancellation, after which the block
        raises the `ExceptionGroup`. If `on_error="collect"`, it is left out.

        Raises:
            ConfigError: There are more than may live at once, or the block has ended meanwhile.
        """
        members = self._entered()
        if len(members) > self._max_live:
            raise ConfigError(
                f"all_ready() cannot be: size={self._size} is more than max_live={self._max_live}, "
                "which may live at once; iterate over the fleet, and delete() each when done."
            )
        if members:
            await asyncio.wait([member.ready for member in members])
        self._entered()
        for member in members:
            member.handed_over = True
        return [member.vm for member in members if member.phase == "ready" and not member.hired]

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

        A job whose VM crashes is cancelled, and has failed. A job that is cancelled may use its VM
        for 2 s more. Whoever does not iterate to the end leaves the rest to the end of the fleet's
        block, or calls `aclose()`.

        Args:
            job: What to do with a VM and an item.
            items: Taken one by one, as there are VMs for them and results are read; they may be
                endless.
            retries: How often a job that has failed is tried again, each time on a fresh VM.
            reuse: Whether a VM does one job after another, as long as it runs, instead of a fresh
                one for each.
            in_order: Whether the results come in the order of the items, instead of as they are
                done.
            on_error: By default that of the fleet. `"raise"`: the first failure cancels the rest.
                `"collect"`: it is raised after all the others' results.

        Raises:
            ExceptionGroup: Of the `JobFailedError`s, from the iteration; with what the items have
                raised, if they have.
            ConfigError: An argument is wrong; the fleet was not entered; or there could be no VM
                for a job: all that may live are with the caller already, or the caller is itself
                a job of this fleet, which the others might wait for.
        """
        self._check_places()
        check_work(job, items, reuse=reuse, in_order=in_order)
        tries = check_count("retries", retries, least=0)
        workers = min(self._size or self._max_live, self._max_live)
        if isinstance(items, Sized):
            workers = min(workers, len(items))
        jobs = Jobs(self._check_places, self._take, self._marked(job), Items(items), tries, reuse)
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
        if not self._block.entered:
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
        if failed and self._on_error == "raise" and not self._block.cancelled:
            self._block.cancel()

    def _on_leave(self, member: Member) -> None:
        self._hired.discard(member)
        self._gone += member.error is None
        self._lost += member.error is not None

    def _marked(self, job: Job[T, R]) -> Job[T, R]:
        async def marked(vm: AsyncSmolVM, item: T) -> R:
            _working_for.set((*_working_for.get(), self))
            return await awaited(job, vm, item)

        return marked

    def _check_places(self) -> None:
        members = self._entered()
        if self in _working_for.get():
            raise ConfigError(
                "map() was called by a job of the same fleet, which holds a VM: they might wait "
                "for each other for ever. Use another Fleet, or call map() outside."
            )
        taken = [
            member
            for member in members
            if member.handed_over and not member.hired and member.vm.status in ACTIVE
        ]
        if len(taken) >= self._max_live:
            raise ConfigError(
                f"map() has no place for a VM: all {len(taken)} that may live were handed over. "
                "delete() some of them, or pass a larger max_live=."
            )

    @property
    def _together(self) -> int:
        """How many VMs it has at once, for all that is known."""
        return max(1, min(self._size, self._max_live))

    def _check_limit(self, most: int | None) -> None:
        if most is None:
            return
        if self._together > most:
            raise HostError(
                f"{_vms(self._together)} of this memory= cannot live at once: max_memory= of the "
                f"limits is enough for {most}. {_instead(most)}, or raise max_memory."
            )
        self._max_live = min(self._max_live, most)

    def _check_room(self, size: int) -> None:
        capacity = LEDGER.capacity()
        if self._together * size > capacity:
            raise HostError(
                f"{_vms(self._together)} of {size} MiB, with QEMU's own, cannot live at once: this "
                f"host can promise {capacity} MiB, enough for {capacity // size}. "
                f"{_instead(capacity // size)}, or free memory of the host."
            )


def _vms(count: int) -> str:
    return "1 VM" if count == 1 else f"{count} VMs"


def _instead(most: int) -> str:
    fewer = f", a smaller size=, or max_live={most}" if most else ""
    return f"Pass a smaller memory={fewer}"
