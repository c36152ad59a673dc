"""One logger for each module; each record carries the id of the VM that it is about."""

from __future__ import annotations

import logging
from contextvars import ContextVar

current_vm: ContextVar[str] = ContextVar("current_vm", default="")


def _add_vm_id(record: logging.LogRecord) -> bool:
    """Set the record's `vm_id`, and begin its message with it."""
    vm_id = current_vm.get()
    record.__dict__["vm_id"] = vm_id
    if vm_id:
        record.msg = f"{vm_id}: {record.msg}"
    return True


def get_logger(name: str) -> logging.Logger:
    """The logger `name`, whose records have the attribute `vm_id` (empty if there is no VM)."""
    logger = logging.getLogger(name)
    logger.addFilter(_add_vm_id)
    return logger
