"""`Fleet`: many VMs at once."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence, Sized
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Self
from weakref import WeakSet

from smolvm_async.config.options import VMOptions
from smolvm_async.errors import ConfigError, HostError, MemberFailedError
from smolvm_async.fleet.jobs import (
    Job,
    LocalMapCall,
    OnError,
    R,
    T,
    awaited,
    check_count,
    check_on_error,
    check_warm,
    check_work,
)
from smolvm_async.fleet.member import WAITING, FleetStatus, Member, Places, check_until
from smolvm_async.fleet.memory import PROMISES
from smolvm_async.fleet.template import Template
from smolvm_async.foundation.fork import this_process
from smolvm_async.foundation.tasks import end_tasks, in_thread, settle, take_exception
from smolvm_async.qemu.events import BootState
from smolvm_async.state.status import ACTIVE
from smolvm_async.vm.block import Block
from smolvm_async.vm.vm import AsyncSmolVM

LIVE_PER_PROCESSOR = 16  # for guests that are mostly idle; measured: 32 guests on two processors
# Under TCG, booting more VMs at once makes each boot slower and the last VM no earlier.
BOOTING_PER_PROCESSOR = 1
NAME = "this Fleet"  # in messages


# The fleets whose map() runs its job in the current task.
_fleets_of_job: ContextVar[tuple[Fleet, ...]] = ContextVar("_fleets_of_job", default=())


class Fleet:
    """A group of VMs on this host.

    ::

        async with Fleet({"memory": 256}, size=20) as fleet:
            async for vm in fleet:
                print((await vm.run("uname -a")).stdout)

        async with Fleet() as fleet:
            async for result in fleet.map(job, items):
                ...

        async with Fleet({"os": "linux", "image": "own.qcow2"}, size=20, warm=True) as fleet:
            ...

    Entering the block starts `size` VMs, as many at a time as the host allows. Leaving the block,
    in any way, kills and deletes all VMs. VMs start in the order they asked. Each VM waits until
    its memory plus QEMU's overhead fits into the host's available memory, minus the memory that
    this process has promised to other fleet VMs but that they do not use yet. Clones of a snapshot
    share the memory that they have not written to, and are promised their whole size all the same.

    VMs of the built-in Debian are clones of a guest that is ready (see `boot` of `AsyncSmolVM`).
    With `warm=`, the fleet boots one VM of your image, takes a snapshot without a name, and deletes
    the VM: all VMs of the fleet are clones of the snapshot. `AsyncSmolVM.from_snapshot()` says what
    a clone has of its own.

    Args:
        template: The arguments of `AsyncSmolVM` for each VM, without `vm_id` and `keep`.
        size: Number of VMs to start on entering, and the maximum that `map()` uses. Without
            `size`, only `map()` starts VMs.
        until: The boot state that a VM must reach before you or a job can use it: `"ready"`,
            `"operating_system"` or `"firmware"`. The VM to clone must reach this state, too.
        max_booting: Number of VMs that may boot at once; by default the number of processors, or
            no limit if `until="firmware"`.
        max_live: Number of VMs that may run at once; by default 16 for each processor, or `size`
            if that is more.
        warm: `True`: the VMs are clones of a VM that has booted. `False`: each VM boots. By
            default, only VMs of the built-in Debian are clones. A number does the same as `True`,
            and the fleet keeps so many VMs ready ahead of the jobs of `map()`, at most `max_live`.
            They take memory.
        from_snapshot: The name of a snapshot that all VMs are clones of. `template` may then only
            have the arguments of `AsyncSmolVM.from_snapshot()`; `data_dir` has the snapshot.
        on_error: `"raise"`: a VM that fails cancels the block, which raises an `ExceptionGroup` of
            `MemberFailedError`s. `"collect"`: other VMs keep running; `failures` lists the errors.

    Raises:
        ConfigError, HostError: An argument is wrong, or the host lacks something that a VM needs;
            see `AsyncSmolVM`. No VM was created.
        SnapshotNotFoundError, SnapshotError: On entering: there is no such snapshot, or this host
            cannot use it.
    """

    def __init__(
        self,
        template: VMOptions | None = None,
        *,
        size: int | None = None,
        until: BootState | str = BootState.READY,
        max_booting: int | None = None,
        max_live: int | None = None,
        warm: bool | int | None = None,
        from_snapshot: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self._ahead = check_warm(warm)
        clones = None if warm is None else bool(warm)
        self._template = Template(template, warm=clones, from_snapshot=from_snapshot)
        self._size = 0 if size is None else check_count("size", size)
        self._until = check_until(until)
        processors = len(os.sched_getaffinity(0))
        most = max(self._size, LIVE_PER_PROCESSOR * processors)
        self._max_live = most if max_live is None else check_count("max_live", max_live)
        booting = BOOTING_PER_PROCESSOR * processors
        if self._until is BootState.FIRMWARE and not self._template.clones:
            # A VM keeps booting after its firmware, where its turn to boot ends. So a limit would
            # not keep the next VM from booting at the same time. Without a limit, 16 VMs reach
            # their firmware in a third of the time.
            booting = self._max_live
        self._max_booting = (
            booting if max_booting is None else check_count("max_booting", max_booting)
        )
        if self._ahead > self._max_live:
            raise ConfigError(
                f"warm={self._ahead} VMs would wait forever: only max_live={self._max_live} may "
                "run at once. Pass a smaller warm= or a larger max_live=."
            )
        self._on_error = check_on_error(on_error)
        self._process = this_process()
        self._places: Places
        self._members: list[Member] = []  # the VMs that the fleet started with
        self._map_members: set[Member] = set()  # VMs made for map() that still exist
        self._spare: deque[Member] = deque()  # those of them that no job has taken yet
        self._original: Member | None = None  # the VM that all others are clones of
        self._cloning: asyncio.Task[None] | None = None
        self._map_deleted = self._map_failed = 0  # number of map() VMs that no longer exist
        self._calls: WeakSet[LocalMapCall[Any, Any]] = WeakSet()
        self._changed = asyncio.Event()
        self._block = Block()
        self._over = False

    @property
    def failures(self) -> Sequence[MemberFailedError]:
        """The errors of VMs that did not start or crashed, except the VMs that `map()` used."""
        return [
            member.error
            for member in self._members
            if member.error is not None and member.taken_by != "map"
        ]

    def status(self) -> FleetStatus:
        """Return the number of VMs that wait, boot and are ready, and the state of each VM."""
        self._check_process()
        original = [self._original] if self._original and not self._original.over.done() else []
        members = [*original, *self._members, *self._map_members]
        phases = [member.phase for member in members]
        return FleetStatus(
            waiting=sum(phase in WAITING for phase in phases),
            booting=phases.count("booting"),
            ready=phases.count("ready"),
            deleted=phases.count("deleted") + self._map_deleted,
            failed=phases.count("failed") + self._map_failed,
            members=tuple(member.status() for member in members),
        )

    async def __aenter__(self) -> Self:
        self._check_process()
        if self._block.entered or self._over:
            raise ConfigError("a Fleet can be entered only once: make a new Fleet.")
        try:
            await self._template.look()
            self._check_limit(self._template.most)
            await in_thread(self._check_room, self._template.memory)
        except BaseException:
            self._template.close()
            raise
        self._places = Places(self._max_live, self._max_booting)
        self._block.enter()
        if self._template.forks:
            self._original = Member(self._template, self._places, self._until, original=True)
            self._cloning = asyncio.ensure_future(self._clone(self._original))
        self._members = [self._make(self._on_member_over) for _ in range(self._size)]
        self._refill()
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if not self._process.is_this:  # only the parent ends the VMs
            return
        self._block.check_loop(NAME)
        self._over = True
        failures = self.failures if self._on_error == "raise" else []
        message = f"{len(failures)} of {self._size} VMs failed"
        group = ExceptionGroup(message, failures) if failures else None
        try:
            await self._block.leave(settle(self._end()), error, lambda: group)
        finally:
            self._template.close()

    async def __aiter__(self) -> AsyncIterator[AsyncSmolVM]:
        """Yield each VM once, as soon as the VM is ready."""
        while waiting := [member for member in self._entered() if member.taken_by is None]:
            self._changed.clear()
            member = next((member for member in waiting if member.phase == "ready"), None)
            if member is not None:
                member.taken_by = "caller"
                yield member.vm
            elif all(member.over.done() for member in waiting):
                return
            else:
                await self._changed.wait()

    async def all_ready(self) -> Sequence[AsyncSmolVM]:
        """Wait until all VMs that the fleet started with are ready, and return them.

        A VM that fails cancels the block and this call; see the class. With
        `on_error="collect"`, the result does not contain the VMs that failed.

        Raises:
            ConfigError: `size` is larger than `max_live`, or the block ended during the call.
        """
        members = self._entered()
        if len(members) > self._max_live:
            raise ConfigError(
                f"all_ready() would wait forever: size={self._size} VMs, but only "
                f"max_live={self._max_live} may run at once. Iterate over the fleet, and delete() "
                "each VM when it is done."
            )
        if members:
            await asyncio.wait([member.ready for member in members])
        self._entered()
        for member in members:
            member.taken_by = member.taken_by or "caller"
        return [
            member.vm
            for member in members
            if member.phase == "ready" and member.taken_by == "caller"
        ]

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

        If a job's VM crashes, `map()` cancels the job, which counts as failed. A cancelled job may
        use its VM for 2 s more. If you stop iterating early, the remaining jobs run until the
        fleet's block ends, or until you call `aclose()`.

        Do not wait for a VM inside a job, or while you hold all `max_live` VMs: that deadlocks.
        `map()` detects this within one fleet, not across two.

        Args:
            job: An async function of a VM and an item.
            items: The jobs' inputs, maybe endless. `map()` takes the next item when a VM is free
                and you read the results.
            retries: The maximum number of retries of a failed job, each on a new VM.
            reuse: Whether a VM that still runs does the next job, too. By default each job gets a
                new VM.
            in_order: Whether to yield results in the order of the items. By default `map()` yields
                each result as soon as its job ends.
            on_error: `"raise"`: the first failure cancels the other jobs. `"collect"`: failures
                are raised after all results. By default the fleet's `on_error`.

        Raises:
            ExceptionGroup: During the iteration: jobs failed. The group has a `JobFailedError` for
                each failed job, and the exception of the items if they raised one.
            ConfigError: An argument is wrong; the fleet's block was not entered; the caller holds
                all `max_live` VMs; or the caller is a job of this fleet.
        """
        self._check_map_possible()
        check_work(job, items, retries, reuse=reuse, in_order=in_order)
        workers = min(self._size or self._max_live, self._max_live)
        if isinstance(items, Sized):
            workers = min(workers, len(items))
        check, marked = self._check_map_possible, self._marked(job)
        call = LocalMapCall(check, self._take, marked, items, retries, reuse)
        self._calls.add(call)
        how = self._on_error if on_error is None else check_on_error(on_error)
        return call.results(max(1, workers), in_order, how)

    async def _end(self) -> None:
        """End every `map()` and delete every VM."""
        self._ahead = 0
        members = [*self._members, *self._map_members]
        await asyncio.gather(
            *(call.end() for call in list(self._calls)), *(member.delete() for member in members)
        )
        if self._cloning is not None:
            await end_tasks(self._cloning)
            self._template.cloned.cancel()

    async def _clone(self, original: Member) -> None:
        """Take a snapshot of the original, delete this VM, and hold the snapshot until cancelled.

        All other VMs wait for `cloned`, and fail if the original fails.
        """
        cloned = self._template.cloned
        try:
            async with self._template.cloning(await asyncio.shield(original.ready)):
                await original.delete()
                cloned.set_result(None)
                await asyncio.Event().wait()
        except Exception as error:
            if not cloned.done():
                crash = original.error.__cause__ if original.error is not None else None
                cloned.set_exception(crash or error)
                take_exception(cloned)
        finally:
            await original.delete()

    def _check_process(self) -> None:
        self._process.check("the fleet", "Make a new Fleet in this process.")

    def _entered(self) -> list[Member]:
        self._check_process()
        if not self._block.entered:
            raise ConfigError("the fleet does not run: use async with Fleet(...) as fleet.")
        self._block.check_loop(NAME)
        return self._members

    def _make(self, on_over: Callable[[Member], None]) -> Member:
        member = Member(self._template, self._places, self._until)
        member.ready.add_done_callback(lambda _: self._changed.set())
        member.over.add_done_callback(lambda _: on_over(member))
        return member

    def _take(self) -> Member:
        """Return a VM for a job: an unused VM of the fleet, or a new VM."""
        for member in self._entered():
            if member.taken_by is None and not member.over.done():
                member.taken_by = "map"
                return member
        member = self._spare.popleft() if self._spare else self._make_for_map()
        self._refill()
        return member

    def _make_for_map(self) -> Member:
        member = self._make(self._on_map_member_over)
        self._map_members.add(member)
        return member

    def _refill(self) -> None:
        """Start VMs until as many are ready ahead of the jobs as `warm=` says.

        A VM that fails is not replaced before the next job, whose own VM then shows the reason.
        """
        while len(self._spare) < self._ahead:
            self._spare.append(self._make_for_map())

    def _on_member_over(self, member: Member) -> None:
        self._changed.set()
        failed = member.error is not None and member.taken_by != "map"
        if failed and self._on_error == "raise" and not self._block.cancelled:
            self._block.cancel()

    def _on_map_member_over(self, member: Member) -> None:
        self._map_members.discard(member)
        with suppress(ValueError):
            self._spare.remove(member)
        self._map_deleted += member.error is None
        self._map_failed += member.error is not None

    def _marked(self, job: Job[T, R]) -> Job[T, R]:
        """Wrap the job so that it notes in `_fleets_of_job` that it runs for this fleet."""

        async def marked(vm: AsyncSmolVM, item: T) -> R:
            _fleets_of_job.set((*_fleets_of_job.get(), self))
            return await awaited(job, vm, item)

        return marked

    def _check_map_possible(self) -> None:
        members = self._entered()
        if self in _fleets_of_job.get():
            raise ConfigError(
                "map() was called by a job of the same fleet, which holds a VM: the two could "
                "deadlock. Use another Fleet, or call map() outside of the job."
            )
        taken = [member.vm for member in members if member.taken_by == "caller"]
        in_use = sum(vm.status in ACTIVE for vm in taken)
        if in_use >= self._max_live:
            raise ConfigError(
                f"map() cannot start a VM: all {in_use} allowed by max_live are in use by the "
                "caller. delete() some of them, or pass a larger max_live=."
            )

    @property
    def _at_once(self) -> int:
        """The smallest number of VMs that the fleet must be able to run at once."""
        return max(1, min(self._size, self._max_live))

    def _check_limit(self, most: int | None) -> None:
        if most is not None and self._at_once > most:
            limit = "max_memory= of limits= is enough"
            raise self._too_many("this memory=", limit, most, "raise max_memory")
        self._max_live = self._max_live if most is None else min(self._max_live, most)

    def _check_room(self, size: int) -> None:
        capacity = PROMISES.capacity()
        if self._at_once * size > capacity:
            limit = f"this host has {capacity} MiB for VMs, which is enough"
            kind = f"{size} MiB, QEMU's overhead included,"
            raise self._too_many(kind, limit, capacity // size, "free memory of the host")

    def _too_many(self, kind: str, limit: str, most: int, remedy: str) -> HostError:
        vms = "1 VM" if self._at_once == 1 else f"{self._at_once} VMs"
        fewer = f", a smaller size=, or max_live={most}" if most else ""
        return HostError(
            f"{vms} of {kind} cannot run at once: {limit} for {most}.",
            hint=f"Pass a smaller memory={fewer}, or {remedy}.",
            missing=("memory",),
        )
