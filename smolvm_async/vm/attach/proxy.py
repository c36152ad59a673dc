"""The proxy through which an attached process uses an object of the owner."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast, get_type_hints

from smolvm_async.foundation.rpc import arguments_by_name, result_from_json, rpc_methods
from smolvm_async.qemu.peripherals import Peripherals

T = TypeVar("T")
Request = Callable[[str, Mapping[str, Any]], Awaitable[Any]]
Post = Callable[[str, Mapping[str, Any]], None]


class _Proxy:
    def __init__(self, kind: type) -> None:
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self._kind.__name__}.{name} is not marked with @rpc: only the VM's owner can use it."
        )


def make_peripherals(request: Request, post: Post) -> Peripherals:
    """Return a proxy of each of the owner's peripherals. See `make_proxy()`."""
    kinds = get_type_hints(Peripherals).items()
    return Peripherals(
        **{name: make_proxy(kind, f"{name}.", request, post) for name, kind in kinds}
    )


def make_proxy(kind: type[T], prefix: str, request: Request, post: Post) -> T:
    """Return an object with the `@rpc` methods of `kind`. It forwards each call to the owner.

    Args:
        kind: The class of the owner's object.
        prefix: The text before the method's name in a request.
        request: Sends a request and waits for its result.
        post: Sends a request that gets no answer.
    """
    proxy = _Proxy(kind)
    for name, method in rpc_methods(kind).items():
        setattr(proxy, name, _forwarding(method, prefix + name, request, post))
    return cast(T, proxy)


def _forwarding(
    method: Callable[..., Any], name: str, request: Request, post: Post
) -> Callable[..., Any]:
    if not inspect.iscoroutinefunction(method):
        return lambda *args, **kwargs: post(name, arguments_by_name(method, args, kwargs))

    async def call(*args: object, **kwargs: object) -> Any:
        values = await request(name, arguments_by_name(method, args, kwargs))
        return result_from_json(method, values)

    return call
