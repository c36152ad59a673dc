"""The controls of a running VM, one file for each control.

A new control needs four changes: a class in `qemu/` that talks to QEMU, with `@rpc` on the methods
that attached processes may call; a field for it in `qemu/peripherals.py`; a class here, which
checks arguments and calls `(await self.in_use()).peripherals`; and its attribute in
`desktop/desktop.py`.
"""
