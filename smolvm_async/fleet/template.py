"""The arguments that all VMs of a fleet share, checked only once for all VMs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import cast

from smolvm_async.config.checks import shown
from smolvm_async.config.options import VMOptions, make_config, new_vm_id
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.errors import ConfigError
from smolvm_async.vm.plan import Plan, find_source
from smolvm_async.vm.prepare import look_at_disk
from smolvm_async.vm.vm import AsyncSmolVM

OWN = {  # arguments that VMs cannot share, and what to do instead
    "vm_id": "each VM gets an id of its own, and fleet.status() shows it",
    "keep": "a fleet deletes its VMs; to keep a VM, use AsyncSmolVM(keep=True)",
}


class Template:
    """The arguments of `AsyncSmolVM` for every VM of a fleet."""

    def __init__(self, arguments: object) -> None:
        self._pattern = AsyncSmolVM(**_checked(arguments))
        _check_ports(self._pattern._vm.config)
        self._plan: Plan | None = None
        self._held = ExitStack()
        weakref.finalize(self, self._held.close)  # Dask workers drop a template without close()

    async def look(self) -> Plan:
        """Return the plan that all VMs share; the first call builds or downloads the image."""
        if self._plan is None:
            plan = await self._pattern._planned()
            source = await find_source(plan, self._held)
            self._plan = plan._replace(source=source, by_bios=await look_at_disk(plan, source))
        return self._plan

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
        """Return a new VM that is not started; call `look()` first."""
        assert self._plan is not None
        config = self._plan.config.model_copy(update={"vm_id": new_vm_id()})
        return AsyncSmolVM._of_plan(self._plan._replace(config=config))


def configure(arguments: object) -> VMConfig:
    """Return the configuration of VMs that other hosts start, without checking this host."""
    options = _checked(arguments)
    if options.get("on_progress") is not None:
        raise ConfigError(
            "template= cannot have on_progress: the VMs start in other processes, which cannot "
            "call the callback. Leave on_progress out, and read the workers' logs."
        )
    config = make_config(**options)
    _check_ports(config)
    return config


def _checked(arguments: object) -> VMOptions:
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
    return cast("VMOptions", dict(arguments))


def _check_ports(config: VMConfig) -> None:
    for forward in config.port_forwards:
        if forward.host_port is not None:
            raise ConfigError(
                f"template= cannot have the host's port {forward.host_port} in port_forwards: "
                "two VMs cannot share a port of the host. Pass only the guest's port; the "
                "host's kernel then chooses a free host port."
            )
