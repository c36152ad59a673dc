"""The parts of a running VM that its controls use: screen, input, VNC server, ports, agent."""

from __future__ import annotations

from typing import NamedTuple, Self

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.qemu.guest_agent import GuestAgent
from smolvm_async.qemu.input import Input
from smolvm_async.qemu.monitor import Monitor
from smolvm_async.qemu.pauses import Pauses
from smolvm_async.qemu.ports import Ports
from smolvm_async.qemu.screen import Screen
from smolvm_async.qemu.vnc import VNCServer


class Peripherals(NamedTuple):
    """One object for each peripheral; in an attached process, a proxy of the object.

    A process that is attached to the VM can call the methods that are marked with `@rpc`. To add a
    peripheral, add a field here and its object in `make()`; `vm/attach/` need not change.
    """

    screen: Screen
    input: Input
    vnc: VNCServer
    ports: Ports
    agent: GuestAgent

    @classmethod
    def make(cls, monitor: Monitor, pauses: Pauses, config: VMConfig) -> Self:
        """Make the peripherals of a VM; QEMU need not run yet."""
        return cls(
            screen=Screen(monitor, config.resolution),
            input=Input(monitor, pauses),
            vnc=VNCServer(monitor, config.data_dir / config.vm_id),
            ports=Ports(monitor),
            agent=GuestAgent(pauses, monitor.explain),
        )
