"""Remote procedure calls: `@rpc` marks the methods that another process may call.

A marked method is written once, with its types. The process that has the object dispatches to its
marked methods and to nothing else; another process has a proxy, which is made from the class. The
arguments and the result travel as JSON and are validated by the method's annotations, so they must
have types that pydantic can write as JSON and read back. A result of type `bytes` travels as it is.

A coroutine function is called, and its result awaited. A plain function is only posted: its caller
goes on at once and is not told of errors. Calls begin in the order in which they were made.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, validate_call
from pydantic_core import to_jsonable_python

from smolvm_async.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])
Method = Callable[..., Any]  # a function of a class

_MARK = "__rpc__"
_ENCODER = json.JSONEncoder(default=functools.partial(to_jsonable_python, bytes_mode="base64"))


def rpc(method: F) -> F:
    """Mark a method that another process may call."""
    setattr(method, _MARK, True)
    return method


def rpc_methods(kind: type) -> Mapping[str, Method]:
    """Return the marked methods of a class and of its parents, by name."""
    return {
        name: method
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if hasattr(method, _MARK)
    }


def arguments_by_name(
    method: Method, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, Any]:
    """Return the arguments of a call, without `self`, by name; raise `TypeError` if wrong."""
    arguments = _signature(method).bind(None, *args, **kwargs).arguments
    del arguments["self"]
    return arguments


def to_json(message: Mapping[str, Any]) -> bytes:
    """Return a message as JSON; pydantic writes what the json module cannot, bytes as base64."""
    return _ENCODER.encode(message).encode()


def arguments_from_json(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a message holds, with the types of the method's annotations."""
    try:
        arguments: dict[str, Any] = _validator(method)(None, **values)
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"wrong arguments: {error}") from error
    return arguments


def result_from_json(method: Method, values: object) -> Any:
    """Return the result that a message holds, with the type of the method's annotation."""
    return _result(method).validate_python(values)


@functools.cache
def _signature(method: Method) -> inspect.Signature:
    return inspect.signature(method)


@functools.cache
def _validator(method: Method) -> Callable[..., Any]:
    """Return a function that takes the arguments of `method` and returns the validated ones."""

    @validate_call(config=ConfigDict(val_json_bytes="base64"))
    @functools.wraps(method)  # pydantic takes the types from the method's annotations
    def take(_self: None, **arguments: Any) -> dict[str, Any]:
        return arguments

    return take


@functools.cache
def _result(method: Method) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(method)["return"])
