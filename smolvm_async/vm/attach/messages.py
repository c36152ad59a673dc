"""The messages on a control socket, and where the socket is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from smolvm_async import errors
from smolvm_async.errors import SmolVMError
from smolvm_async.qemu.shutdown import ShutdownReport
from smolvm_async.state.directory import CONTROL

MAX_MESSAGE = 16 << 20  # bytes; the whole console, escaped, is under 2 MiB
SERVER_ERROR = -32000  # JSON-RPC 2.0: the server's own errors begin here


def address(dir_fd: int) -> str:
    """The socket in an open directory: a path through /proc is never over the 107 bytes allowed."""
    return f"/proc/self/fd/{dir_fd}/{CONTROL}"


def encode(message: Mapping[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """One line as a message.

    Raises:
        ValueError: If it is none.
    """
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("a JSON-RPC message is an object")
    return message


def error_to_json(error: Exception) -> dict[str, Any]:
    """An exception as a JSON-RPC error."""
    return {"code": SERVER_ERROR, "message": str(error), "data": type(error).__name__}


def error_from_json(values: Mapping[str, Any]) -> SmolVMError:
    """The exception that the other side had; one that is not known here is a `SmolVMError`."""
    kind = getattr(errors, str(values.get("data")), SmolVMError)
    return kind(values["message"]) if issubclass(kind, SmolVMError) else SmolVMError(str(values))


def report_to_json(report: ShutdownReport) -> Any:
    """A shutdown report in JSON's types."""
    return TypeAdapter(ShutdownReport).dump_python(report, mode="json")


def report_from_json(values: Any) -> ShutdownReport:
    """The shutdown report that `report_to_json` was given."""
    return TypeAdapter(ShutdownReport).validate_python(values)
