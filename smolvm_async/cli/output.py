"""What is written: text and tables through rich, JSON as it is, and a sign of life meanwhile."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from smolvm_async.foundation import progress
from smolvm_async.foundation.tail import printable

UNBOUNDED = 1 << 16  # columns of what is no terminal: nothing is cut off or wrapped


class Screen(Console):
    """A console that shows text as it is, and tells its caller when nobody reads any more."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream: TextIO | None = sys.stderr if stderr else sys.stdout  # None if it was closed
        terminal = stream is not None and stream.isatty()
        super().__init__(
            stderr=stderr,
            width=None if terminal else UNBOUNDED,
            highlight=False,
            markup=False,
            emoji=False,
        )

    def on_broken_pipe(self) -> None:
        """Raise the error that is being handled; rich itself would end the program."""
        write_nowhere()
        raise


def write_nowhere() -> None:
    """Nobody reads stdout any more: what is still written, and was, goes to /dev/null."""
    if sys.stdout is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


out = Screen()
err = Screen(stderr=True)


def say(text: str) -> None:
    """Write text to stdout."""
    out.print(Text(printable(text)), soft_wrap=True)


def complain(word: str, text: str, style: str) -> None:
    """Write a message to stderr, after a word in colour."""
    err.print(Text.assemble((f"{word}: ", style), printable(text)), soft_wrap=True)


def write_json(document: object) -> None:
    """Write a JSON document to stdout, on one line."""
    out.print(json.dumps(document, default=str), soft_wrap=True)


def write_text(text: str) -> None:
    """Write a guest's text to stdout: as it is, but for a terminal, which it could take over."""
    if sys.stdout is not None:
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def write_bytes(content: bytes) -> None:
    """Write what is no text to stdout."""
    if sys.stdout is not None:
        sys.stdout.buffer.write(content)
        sys.stdout.flush()


def show_table(columns: Mapping[str, Any], rows: Sequence[Sequence[str]]) -> None:
    """Write a table, whose columns have rich's own arguments, to stdout."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, arguments in columns.items():
        table.add_column(title, **arguments)
    for row in rows:
        table.add_row(*(Text(printable(cell).replace("\n", " ")) for cell in row))
    out.print(table)


@contextmanager
def busy(text: str, *, json: bool) -> Iterator[Callable[[str], None]]:
    """Show on a terminal that work goes on and how long already; yields what changes the text."""
    if json or not out.is_interactive:
        yield lambda text: None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda text: bar.update(task, description=printable(text))


@contextmanager
def transfer(text: str, *, json: bool) -> Iterator[progress.ProgressCallback]:
    """Show a transfer on a terminal: a bar, bytes, rate; yields what takes its progress."""
    if json or not out.is_interactive:
        yield lambda step: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(printable(text), total=None)

        def show(step: progress.Progress) -> None:
            done = step.done if step.done is not None else 0
            bar.update(task, description=printable(step.message), completed=done, total=step.total)

        yield show
