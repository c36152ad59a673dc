"""One logger for each module; each record carries the id of the VM that it is about.

A handler may keep records. Of an exception they have the text: itself it would keep the VM's event
loop alive, and with that its thread.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

current_vm: ContextVar[str] = ContextVar("current_vm", default="")


def _complete(record: logging.LogRecord) -> bool:
    """Set the record's `vm_id`, begin its message with it, and let go of exceptions."""
    vm_id = current_vm.get()
    record.__dict__["vm_id"] = vm_id
    if vm_id:
        record.msg = f"{vm_id}: {record.msg}"
    if isinstance(record.args, tuple):
        record.args = tuple(str(a) if isinstance(a, BaseException) else a for a in record.args)
    return True


def get_logger(name: str) -> logging.Logger:
    """The logger `name`, whose records have the attribute `vm_id` (empty if there is no VM)."""
    logger = logging.getLogger(name)
    logger.addFilter(_complete)
    return logger
