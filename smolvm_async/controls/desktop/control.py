"""What the controls share: the VM that they act on."""

from __future__ import annotations

from smolvm_async.controls.interface import VM, Run, running
from smolvm_async.errors import VMNotRunningError
from smolvm_async.state.record import Status


class Control:
    """One group of things that one does to a running VM.

    Attributes:
        vm: That VM, as this process has it; attaching anew changes it.
    """

    def __init__(self, vm: VM) -> None:
        self.vm = vm

    def running(self) -> Run:
        """Its run.

        Raises:
            VMNotRunningError: If its QEMU does not run.
        """
        return running(self.vm)

    def taking_input(self) -> Run:
        """Its run; QEMU drops what one types into a paused guest.

        Raises:
            VMNotRunningError: If it does not run, or is paused.
        """
        run = self.running()
        if self.vm.status is Status.PAUSED:
            raise VMNotRunningError(
                f"{self.vm.config.vm_id} is paused, and takes no input: resume() it first."
            )
        return run
