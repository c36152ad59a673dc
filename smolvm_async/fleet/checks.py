"""What the arguments of fleets and of `map()` may be."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, Callable, Iterable

from smolvm_async.config.checks import shown
from smolvm_async.errors import ConfigError
from smolvm_async.fleet.jobs import OnError
from smolvm_async.qemu.events import BootState


def check_count(argument: str, value: object, least: int = 1) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 100_000:
        raise ConfigError(
            f"{argument}={shown(value)} is wrong: pass a whole number from {least} to 100000."
        )
    return value


def check_until(state: object) -> BootState:
    """A boot state that can be waited for."""
    known = [str(name) for name in BootState if name is not BootState.LAUNCHING]
    if state not in known:
        raise ConfigError(f"until={shown(state)} is wrong: pass one of {', '.join(known)}.")
    return BootState(str(state))


def check_on_error(how: object) -> OnError:
    """What is done about failures."""
    if how == "raise":
        return "raise"
    if how == "collect":
        return "collect"
    raise ConfigError(f"on_error={shown(how)} is wrong: pass 'raise' or 'collect'.")


def check_work(job: object, items: object, **switches: object) -> None:
    """What `map()` is given to do."""
    if not callable(job) or inspect.isgeneratorfunction(job) or inspect.isasyncgenfunction(job):
        raise ConfigError(f"job={shown(job)} is wrong: pass an async function of (vm, item).")
    if reason := _why_not_callable(job):
        raise ConfigError(
            f"job={shown(job)} is wrong: it is called with a VM and an item, and cannot be "
            f"({reason}). Pass an async function of (vm, item)."
        )
    if not isinstance(items, Iterable | AsyncIterable):
        raise ConfigError(f"items={shown(items)} is wrong: pass what can be iterated over.")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={shown(value)} is wrong: pass True or False.")


def _why_not_callable(job: Callable[..., object]) -> str:
    """Why it cannot be called with a VM and an item; empty if it can, or does not tell."""
    try:
        signature = inspect.signature(job)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(None, None)
    except TypeError as error:
        return str(error)
    return ""
