"""The messages on a control socket, and the path of the socket."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from smolvm_async import errors
from smolvm_async.controls.commands.result import CommandResult
from smolvm_async.errors import SmolVMError
from smolvm_async.foundation.rpc import to_json
from smolvm_async.qemu.events import Trouble
from smolvm_async.state.names import CONTROL

PROTOCOL = 3  # the version of the messages; a client refuses an owner with another version
MAX_MESSAGE = 16 << 20  # bytes; the whole console, escaped, takes less than 2 MiB
SERVER_ERROR = -32000  # JSON-RPC 2.0: a server's own errors begin with this code


@functools.cache
def version() -> str:
    """Return the version of smolvm_async."""
    try:
        return metadata.version("smolvm-async")
    except metadata.PackageNotFoundError:  # not installed: the library runs from its sources
        return "unknown"


def address(dir_fd: int) -> str:
    """Return the socket's path in an open directory. With /proc, it is under 107 bytes long."""
    return f"/proc/self/fd/{dir_fd}/{CONTROL}"


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as a line of JSON."""
    return to_json({"jsonrpc": "2.0", **message}) + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Return the message in a line. Raise a `ValueError` if the line is not a message."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("a JSON-RPC message is an object")
    return message


def error_to_json(error: Exception) -> dict[str, Any]:
    """Return an exception as a JSON-RPC error, with all fields of a `SmolVMError`."""
    values = {"code": SERVER_ERROR, "message": str(error), "data": type(error).__name__}
    return {**values, "fields": error.to_json()} if isinstance(error, SmolVMError) else values


def error_from_json(values: Mapping[str, Any]) -> SmolVMError:
    """Return the exception that the other process sent. An unknown class becomes a `SmolVMError`.

    The other process may have another version of this library, or be an impostor. So accept only
    fields that the class has here, with values of the declared types.
    """
    kind = getattr(errors, str(values.get("data")), None)
    if not (isinstance(kind, type) and issubclass(kind, SmolVMError)):
        kind = SmolVMError
    sent = {"message": str(values.get("message"))}
    if isinstance(values.get("fields"), dict):
        sent |= values["fields"]
    types = get_type_hints(kind, localns={"CommandResult": CommandResult, "Trouble": Trouble})
    fields = {}
    for field in dataclasses.fields(kind):
        with suppress(KeyError, ValueError):
            value = restore(sent[field.name])
            fields[field.name] = TypeAdapter(types[field.name]).validate_python(value)
    return kind(**fields)


def restore(value: Any) -> Any:
    """Return a value of `SmolVMError.to_json()` with base64 decoded to bytes."""
    if isinstance(value, dict):
        if [*value] == ["base64"]:
            return base64.b64decode(str(value["base64"]))
        return {name: restore(part) for name, part in value.items()}
    return [restore(part) for part in value] if isinstance(value, list) else value
