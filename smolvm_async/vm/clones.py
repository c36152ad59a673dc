"""Clones: VMs that start from a snapshot, or from a running VM.

`from_snapshot()` and `fork()` return an object that can be awaited, or entered as a block. With
`await`, the caller has to delete the VMs; the block does so at its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from smolvm_async.config.options import CloneOptions
from smolvm_async.controls.interface import wake
from smolvm_async.errors import SmolVMError, SnapshotNotFoundError
from smolvm_async.foundation.tasks import end_tasks, in_background, settle
from smolvm_async.state.snapshot_directory import fork_name
from smolvm_async.state.snapshots import (
    SNAPSHOTS,
    Snapshot,
    delete_snapshot,
    held_snapshot,
    new_snapshot,
)
from smolvm_async.vm.plan import make_clone_plan

if TYPE_CHECKING:
    from smolvm_async.vm.vm import AsyncSmolVM

V = TypeVar("V", bound="AsyncSmolVM")
T_co = TypeVar("T_co", covariant=True)


class Starting(Generic[T_co]):
    """VMs that are about to start: `await` starts them, `async with` also deletes them at the end.

    ::

        vm = await AsyncSmolVM.from_snapshot("name")
        async with AsyncSmolVM.from_snapshot("name") as vm:
            ...
    """

    def __init__(
        self, start: Callable[[], Awaitable[list[V]]], result: Callable[[list[V]], T_co]
    ) -> None:
        self._start = start
        self._result = result
        self._block = AsyncExitStack()
        self._vms: list[V] = []

    def __await__(self) -> Generator[object, None, T_co]:
        return self._started().__await__()

    async def _started(self) -> T_co:
        return self._result(await self._start())

    async def __aenter__(self) -> T_co:
        self._vms = await self._start()
        async with AsyncExitStack() as block:
            for vm in self._vms:
                block.push_async_exit(vm.__aexit__)
            for vm in self._vms:
                await vm.__aenter__()
            self._block = block.pop_all()
        return self._result(self._vms)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        async with self._block.pop_all() as block:
            if error is None:  # the guests power down at the same time
                with suppress(SmolVMError):
                    await asyncio.gather(*(vm.stop() for vm in self._vms))
            return await block.__aexit__(kind, error, traceback)


async def restore(kind: type[V], name: str, options: CloneOptions, data_dir: Path) -> list[V]:
    """Start a VM from a snapshot in `data_dir`."""
    vms: list[V] = []
    async with _all_or_none(vms), held_snapshot(data_dir / SNAPSHOTS, name) as held:
        await _start(kind, held, [options], vms)
    return vms


async def fork(vm: V, count: int, options: CloneOptions) -> list[V]:
    """Start clones of a running VM."""
    from smolvm_async.vm.limits import check_clones

    await in_background(check_clones, count, vm._vm.config.memory)
    vms: list[V] = []
    async with _all_or_none(vms), forked(vm) as held:
        await _start(type(vm), held, [options] * count, vms)
    return vms


@asynccontextmanager
async def _all_or_none(vms: list[V]) -> AsyncIterator[None]:
    """Delete the VMs that the block adds to `vms`, if the block fails or is cancelled."""
    try:
        yield
    except BaseException:
        await settle(asyncio.gather(*(vm.delete() for vm in vms)))
        raise


@asynccontextmanager
async def forked(vm: AsyncSmolVM) -> AsyncIterator[Snapshot]:
    """Take a snapshot without a name, for the time of the block."""
    root = vm._vm.config.data_dir / SNAPSHOTS
    name = fork_name(root)
    await wake(vm._vm)
    if (owned := vm._owned) is not None:
        async with new_snapshot(root, name) as new:
            await in_background(new.complete, await owned.save(new, {}))
            yield new
        return
    try:
        # Only the owner can take it, and takes it even if this call is cancelled: then wait.
        await settle(vm._vm.snapshot(name, {}))
        async with held_snapshot(root, name) as held:
            yield held
    finally:
        with suppress(SnapshotNotFoundError):
            await delete_snapshot(root, name)


async def _start(
    kind: type[V],
    held: Snapshot,
    options: Sequence[CloneOptions],
    vms: list[V],
) -> None:
    """Start one VM for each item of `options`, and add them to `vms`."""
    vms.extend(kind._of_plan(make_clone_plan(held.record, held, each)) for each in options)
    starts = [asyncio.ensure_future(vm.start()) for vm in vms]
    try:
        await asyncio.gather(*starts)
    except BaseException:
        await end_tasks(*starts)
        raise
