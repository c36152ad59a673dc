"""The arguments that all VMs of a fleet share, checked only once for all VMs.

The VMs of a fleet start in one of three ways:

- Each VM starts like any `AsyncSmolVM`: it boots, or is a clone of the library's own ready guest.
- Each VM is a clone of a named snapshot (`from_snapshot`).
- A first VM, the original, boots. All other VMs are clones of a snapshot of the original, which
  exists only as long as the fleet (`forks`).
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from typing import cast

from smolvm_async.config.checks import check_snapshot_name, shown
from smolvm_async.config.options import (
    CloneOptions,
    VMOptions,
    make_config,
    new_vm_id,
)
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.tasks import running_loop
from smolvm_async.state.snapshots import SNAPSHOTS, held_snapshot
from smolvm_async.vm.compatibility import check_loadable
from smolvm_async.vm.plan import Plan, find_source, make_clone_plan
from smolvm_async.vm.prepare import look_at_disk
from smolvm_async.vm.vm import AsyncSmolVM

OWN = {  # arguments that VMs cannot share, and what to do instead
    "vm_id": "each VM gets an id of its own, and fleet.status() shows it",
    "keep": "a fleet deletes its VMs; to keep a VM, use AsyncSmolVM(keep=True)",
}


class Template:
    """The arguments of `AsyncSmolVM` for every VM of a fleet.

    Args:
        warm: Whether VMs are clones where the image does not decide this; `None` lets it decide.
        from_snapshot: The name of the snapshot that all VMs are clones of.

    Attributes:
        forks: Whether all VMs are clones of an original; see the module's docstring.
        clones: Whether VMs start from a snapshot of any kind.
        cloned: Done when the snapshot of the original exists; its exception says why there is none.
    """

    def __init__(
        self, arguments: object, *, warm: bool | None = None, from_snapshot: str | None = None
    ) -> None:
        self._name, self._options = from_snapshot, _checked(arguments, from_snapshot)
        if from_snapshot is not None:
            config = make_config(**self._options)  # checks the values
        else:
            if warm is False:
                self._options["boot"] = self._options.get("boot") or "cold"
            self._pattern = AsyncSmolVM(**self._options)
            config = self._pattern._vm.config
        _check_ports(config)
        self._data_dir = config.data_dir
        warm_boot = config.boot == "warm"
        if warm is False and (warm_boot or from_snapshot is not None):
            raise ConfigError(
                "warm=False cannot be given together with from_snapshot= or boot='warm' in "
                "template=, which start clones: leave one of them out."
            )
        self.forks = warm is True and from_snapshot is None and not warm_boot
        self.clones = self.forks or warm_boot or from_snapshot is not None
        self.cloned: asyncio.Future[None]
        self._plan: Plan | None = None
        self._held = ExitStack()
        weakref.finalize(self, self._held.close)  # Dask workers drop a template without close()

    async def look(self) -> Plan:
        """Return the plan that all VMs share; the first call builds or downloads the image."""
        if self._plan is None:
            self.cloned = running_loop().create_future()
            if not self.forks:
                self.cloned.set_result(None)
            if self._name is not None:
                self._plan = await self._look_at_snapshot(self._name)
            else:
                plan = await self._pattern._planned()
                source = await find_source(plan, self._held)
                self._plan = plan._replace(source=source, by_bios=await look_at_disk(plan, source))
        return self._plan

    async def _look_at_snapshot(self, name: str) -> Plan:
        snapshot = (self._data_dir / SNAPSHOTS, name)
        async with held_snapshot(*snapshot) as held:
            plan = make_clone_plan(held.record, snapshot, cast("CloneOptions", self._options))
            await check_loadable(held, plan)
        return plan

    def close(self) -> None:
        """Release the image, so that the cache may remove it."""
        self._held.close()

    @property
    def memory(self) -> int:
        """The MiB that one VM may use, including QEMU's overhead; call `look()` first."""
        assert self._plan is not None
        memory = self._plan.config.memory
        return memory + self._plan.accelerator.overhead(memory)

    @property
    def most(self) -> int | None:
        """The number of VMs that `Limits.max_memory` allows at once; call `look()` first."""
        assert self._plan is not None
        limit = self._plan.config.limits.max_memory
        return None if limit is None else limit // self._plan.config.memory

    def make(self) -> AsyncSmolVM:
        """Return a new VM that is not started; call `look()` first.

        The VM starts according to the plan at its start: the original makes the others clones.
        """
        assert self._plan is not None
        config = self._plan.config.model_copy(update={"vm_id": new_vm_id()})

        async def find_plan() -> Plan:
            assert self._plan is not None
            return self._plan._replace(config=config)

        plan = self._plan._replace(config=config)
        return AsyncSmolVM._of_plan(plan, find_plan if self.forks else None)

    @asynccontextmanager
    async def cloning(self, original: AsyncSmolVM) -> AsyncIterator[None]:
        """Take a snapshot of the original, from which all VMs start during the block."""
        from smolvm_async.vm.clones import forked

        assert self._plan is not None
        async with forked(original) as snapshot:
            self._plan = self._plan._replace(snapshot=snapshot)
            yield


def configure(arguments: object, from_snapshot: str | None = None) -> VMConfig:
    """Return the configuration of VMs that other hosts start, without checking this host."""
    options = _checked(arguments, from_snapshot)
    if options.get("on_progress") is not None:
        raise ConfigError(
            "template= cannot have on_progress: the VMs start in other processes, which cannot "
            "call the callback. Leave on_progress out, and read the workers' logs."
        )
    config = make_config(**options)
    _check_ports(config)
    return config


def _checked(arguments: object, from_snapshot: object = None) -> VMOptions:
    if from_snapshot is not None:
        check_snapshot_name(from_snapshot, "from_snapshot")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ConfigError(
            f"template={shown(arguments)} is wrong: pass a mapping of AsyncSmolVM's arguments, "
            "such as {'memory': 512}."
        )
    unknown = sorted(str(name) for name in arguments if name not in VMOptions.__annotations__)
    if unknown:
        raise ConfigError(
            f"template= has unknown arguments ({', '.join(unknown)}): pass only arguments of "
            "AsyncSmolVM."
        )
    for name, instead in OWN.items():
        if arguments.get(name):
            raise ConfigError(f"template= cannot have {name}: {instead}.")
    fixed = sorted(arguments.keys() - CloneOptions.__annotations__.keys())
    if from_snapshot is not None and fixed:
        raise ConfigError(
            f"template= cannot have {', '.join(fixed)} together with from_snapshot=: the snapshot "
            "fixes the machine. Leave these arguments out."
        )
    return cast("VMOptions", dict(arguments))


def _check_ports(config: VMConfig) -> None:
    for forward in config.port_forwards:
        if forward.host_port is not None:
            raise ConfigError(
                f"template= cannot have the host's port {forward.host_port} in port_forwards: "
                "two VMs cannot share a port of the host. Pass only the guest's port; the "
                "host's kernel then chooses a free host port."
            )
