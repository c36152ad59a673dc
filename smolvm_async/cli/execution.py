"""How a command is executed: its signals, its errors, its exit code."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Mapping
from typing import Any, NoReturn, TypeVar

import typer

from smolvm_async import ConfigError, HostError, SmolVMError, VMNotFoundError
from smolvm_async.cli.output import complain, write_json

T = TypeVar("T")

FAILED, WRONG = 1, 2
CODES: dict[type[Exception], int] = {VMNotFoundError: 4, HostError: 3, ConfigError: WRONG}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP cancel the command; the first one does not if it is spared.

    Nor does a later SIGHUP then: a terminal that closes may send several.

    Attributes:
        first: Set when one has come.
        number: The latest one.
    """

    def __init__(self, *, spare_first: bool = False) -> None:
        self.first = asyncio.Event()
        self.number = signal.SIGINT
        self._spare_first = spare_first

    async def during(self, command: Coroutine[Any, Any, T]) -> T:
        """Await the command, with the signals handled."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a job in the background
                loop.add_signal_handler(number, self._on_signal, number, task)
        return await command

    def _on_signal(self, number: signal.Signals, task: asyncio.Task[Any]) -> None:
        self.number = number
        if not self._spare_first or (self.first.is_set() and number != signal.SIGHUP):
            task.cancel()
        self.first.set()


def execute(
    command: Coroutine[Any, Any, T], *, json: bool, interrupts: Interrupts | None = None
) -> T:
    """Execute a command; what it raises becomes a message and an exit code."""
    interrupts = interrupts or Interrupts()
    try:
        return asyncio.run(interrupts.during(command))
    except asyncio.CancelledError:
        number = interrupts.number
        fail("Interrupted", f"interrupted by {number.name}", 128 + number, json=json)
    except BrokenPipeError:
        raise typer.Exit(FAILED) from None  # nobody reads any more: there is nobody to tell
    except (SmolVMError, OSError) as error:
        code = next((CODES[kind] for kind in CODES if isinstance(error, kind)), FAILED)
        data = error.to_json() if isinstance(error, SmolVMError) else {}
        fail(type(error).__name__, str(error), code, json=json, data=data)


def fail(
    kind: str, message: str, code: int, *, json: bool, data: Mapping[str, object] | None = None
) -> NoReturn:
    """Say what failed, and exit.

    Args:
        kind: The class of the error.
        message: The whole text, with the hint.
        code: The exit code.
        json: Whether to write JSON.
        data: The fields of the error, for the JSON.
    """
    if json:
        write_json({"error": {**(data or {}), "type": kind, "message": message}})
    else:
        complain("Error", message, "bold red")
    raise typer.Exit(code)
