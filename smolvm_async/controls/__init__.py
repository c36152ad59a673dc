"""The controls of a running VM, one file for each.

A new control takes four files: a class in `qemu/` that talks to QEMU, with `@rpc` on the methods
that attached processes may call; a field for it in `qemu/peripherals.py`; a class here, which
checks arguments and calls `self.running().peripherals`; and its attribute in `desktop/desktop.py`.
"""
