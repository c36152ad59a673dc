"""Loggers, one for each module. Each log record carries the id of its VM.

A handler may keep records forever. So a record holds the text of an exception, not the exception:
the traceback refers to the VM's event loop, so the loop and its thread would never be freed.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

current_vm: ContextVar[str] = ContextVar("current_vm", default="")


def _complete(record: logging.LogRecord) -> bool:
    """Set the record's `vm_id`, prefix the message with it, and turn exceptions into text."""
    vm_id = current_vm.get()
    record.__dict__["vm_id"] = vm_id
    if vm_id:
        record.msg = f"{vm_id}: {record.msg}"
    if isinstance(record.args, tuple):
        record.args = tuple(str(a) if isinstance(a, BaseException) else a for a in record.args)
    return True


def get_logger(name: str) -> logging.Logger:
    """Return the logger `name`; its records have the attribute `vm_id`, empty if there is no VM."""
    logger = logging.getLogger(name)
    logger.addFilter(_complete)
    return logger
