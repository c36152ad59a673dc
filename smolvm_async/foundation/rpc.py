"""Remote procedure calls: `@rpc` marks the methods that another process may call.

A marked method is written once, with its types. The process that owns the object accepts calls of
marked methods only; other processes use a proxy, which is made from the class. Arguments and
results are sent as JSON and validated against the method's annotations, so they must have types
that pydantic can write as JSON and read back. A result of type `bytes` is sent unchanged.

The caller of a coroutine function waits for its result. A plain function is only posted: the caller
continues at once and gets no errors. Calls begin in the order in which they were made.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from pydantic import ConfigDict, ValidationError
from pydantic_core import to_jsonable_python

from smolvm_async.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

F = TypeVar("F", bound=Callable[..., Any])
Method = Callable[..., Any]  # a function of a class, not bound to an object

_MARK = "__rpc__"
_ENCODER = json.JSONEncoder(default=functools.partial(to_jsonable_python, bytes_mode="base64"))


def rpc(method: F) -> F:
    """Mark a method as callable from other processes."""
    setattr(method, _MARK, True)
    return method


def rpc_methods(kind: type) -> Mapping[str, Method]:
    """Return the marked methods of a class and its base classes, by name."""
    return {
        name: method
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if hasattr(method, _MARK)
    }


def arguments_by_name(
    method: Method, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, Any]:
    """Return a call's arguments by name, without `self`; raise `TypeError` if they do not fit."""
    arguments = _signature(method).bind(None, *args, **kwargs).arguments
    del arguments["self"]
    return arguments


def to_json(message: Mapping[str, Any]) -> bytes:
    """Return a message as JSON; pydantic converts values that json cannot (bytes to base64)."""
    return _ENCODER.encode(message).encode()


def arguments_from_json(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments in a message, converted to the types of the method's annotations."""
    try:
        arguments: dict[str, Any] = _validator(method)(None, **values)
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"wrong arguments: {error}") from error
    return arguments


def result_from_json(method: Method, values: object) -> Any:
    """Return the result in a message, converted to the method's return type."""
    return _result(method).validate_python(values)


@functools.cache
def _signature(method: Method) -> inspect.Signature:
    return inspect.signature(method)


@functools.cache
def _validator(method: Method) -> Callable[..., Any]:
    """Return a function that validates the arguments of `method` and returns them."""
    from pydantic import validate_call  # only attached processes need it

    @validate_call(config=ConfigDict(val_json_bytes="base64"))
    @functools.wraps(method)  # pydantic reads the types from the annotations
    def take(_self: None, **arguments: Any) -> dict[str, Any]:
        return arguments

    return take


@functools.cache
def _result(method: Method) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(get_type_hints(method)["return"])
