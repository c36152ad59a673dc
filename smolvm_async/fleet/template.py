"""What all VMs of a fleet have in common: checked, and looked up on the host, once."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from smolvm_async.config.checks import shown
from smolvm_async.config.vm_config import VMConfig, make_config, new_vm_id
from smolvm_async.errors import ConfigError
from smolvm_async.vm.plan import Plan, find_source
from smolvm_async.vm.prepare import look_at_disk
from smolvm_async.vm.vm import AsyncSmolVM

OWN = {  # arguments that two VMs cannot have in common, and what to do instead
    "vm_id": "each gets an id of its own, which fleet.status() tells",
    "keep": "a fleet deletes its VMs; keep one with AsyncSmolVM(keep=True)",
}


class Template:
    """The arguments of `AsyncSmolVM` for every VM of a fleet.

    Raises:
        ConfigError, HostError: See `AsyncSmolVM`.
    """

    def __init__(self, arguments: object) -> None:
        self._pattern = AsyncSmolVM(**_checked(arguments))
        _check_ports(self._pattern._vm.config)
        self._plan: Plan | None = None
        self._held = ExitStack()
        weakref.finalize(self, self._held.close)  # Dask workers just drop it

    async def look(self) -> Plan:
        """What the host has for these VMs, and their image; built or downloaded once.

        Raises:
            ConfigError, HostError, CommandError: See `AsyncSmolVM`.
        """
        if self._plan is None:
            plan = await self._pattern._planned()
            source = await find_source(plan, self._held)
            self._plan = plan._replace(source=source, by_bios=await look_at_disk(plan, source))
        return self._plan

    def close(self) -> None:
        """The image is needed no more."""
        self._held.close()

    @property
    def memory(self) -> int:
        """MiB that one VM may come to use, QEMU's own with it; after `look()`."""
        assert self._plan is not None
        memory = self._plan.config.memory
        return memory + self._plan.accelerator.overhead(memory)

    @property
    def most(self) -> int | None:
        """How many may live at once by `Limits.max_memory`, if it is set; after `look()`."""
        assert self._plan is not None
        limit = self._plan.config.limits.max_memory
        return None if limit is None else limit // self._plan.config.memory

    def make(self) -> AsyncSmolVM:
        """One more VM, not started; after `look()`."""
        assert self._plan is not None
        config = self._plan.config.model_copy(update={"vm_id": new_vm_id()})
        return AsyncSmolVM._of_plan(self._plan._replace(config=config))


def configure(arguments: object) -> VMConfig:
    """What the arguments say, without a look at this host: for VMs that another one starts.

    Raises:
        ConfigError: See `AsyncSmolVM`.
    """
    options = {**(AsyncSmolVM.__init__.__kwdefaults__ or {}), **_checked(arguments)}
    if options.pop("on_progress") is not None:
        raise ConfigError(
            "template= cannot have on_progress: the VMs start in other processes, which cannot "
            "call it; their logs tell."
        )
    features = {
        "mounts": options.pop("mounts") or options.pop("writable_mounts"),
        "internet_settings": options.pop("internet_settings") is not None,
    }
    options.pop("writable_mounts", None)
    config = make_config(**options, features=features)
    _check_ports(config)
    return config


def _checked(arguments: object) -> Mapping[str, Any]:
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ConfigError(
            f"template={shown(arguments)} is wrong: pass a mapping of AsyncSmolVM's arguments, "
            "such as {'memory': 512}."
        )
    unknown = sorted(str(name) for name in arguments if name not in _known())
    if unknown:
        raise ConfigError(
            f"template= has {', '.join(unknown)}, which is no argument of AsyncSmolVM."
        )
    for name, instead in OWN.items():
        if arguments.get(name):
            raise ConfigError(f"template= cannot have {name}: {instead}.")
    return arguments


def _check_ports(config: VMConfig) -> None:
    for forward in config.port_forwards:
        if forward.host_port is not None:
            raise ConfigError(
                f"template= cannot have the host's port {forward.host_port} in port_forwards: "
                "two VMs cannot share it; give the guest's port alone, and the kernel chooses."
            )


def _known() -> set[str]:
    return {*(AsyncSmolVM.__init__.__kwdefaults__ or ())}
