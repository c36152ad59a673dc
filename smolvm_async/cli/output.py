"""The output of commands: text, tables and progress through rich, or JSON."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from smolvm_async import ShutdownReport
from smolvm_async.foundation import progress
from smolvm_async.foundation.tail import printable
from smolvm_async.qemu.shutdown import ENDINGS

AGES = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
LEFT, RIGHT = {"no_wrap": True}, {"no_wrap": True, "justify": "right"}
STYLES: dict[str, dict[str, Any]] = {  # of columns; the type aligns other columns
    "vm_id": {"no_wrap": True, "min_width": 8},
    "image": {"overflow": "fold"},
    "labels": {"overflow": "fold"},
}
OPTIONAL = ("host", "labels", "resident", "processors")  # columns
UNBOUNDED = 1 << 16  # columns, if stdout is not a terminal, so that rich does not wrap lines


class Screen(Console):
    """A console that shows text unchanged, and raises an error when its reader is gone."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream: TextIO | None = sys.stderr if stderr else sys.stdout  # None if the stream is closed
        terminal = stream is not None and stream.isatty()
        super().__init__(
            stderr=stderr,
            width=None if terminal else UNBOUNDED,
            highlight=False,
            markup=False,
            emoji=False,
        )

    def on_broken_pipe(self) -> None:
        """Raise the current error again; without this method, rich would exit the program."""
        write_nowhere()
        raise


def write_nowhere() -> None:
    """Redirect stdout to /dev/null, including the output that is still in the buffer."""
    if sys.stdout is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


out = Screen()
err = Screen(stderr=True)


# The library's messages name its arguments; these have an option with the same meaning.
OPTIONS = {
    **{
        name: name
        for name in (
            *("accel", "boot", "channel", "cpus", "key", "memory", "os", "resolution", "user"),
            "vnc",
        )
    },
    "password": "password-file",
    "idle_timeout": "idle-timeout",
    "ttl": "ttl",
    "count": "count",
    "data_dir": "data-dir",
    "cwd": "workdir",
    "env": "env",
    "gone_host": "gone-host",
    "keep": "keep",
    "labels": "label",
    "mode": "internet",
    "vm_id": "id",
}


# The messages also name methods. A command, or a verb, has the same meaning.
COMMANDS = {
    "AsyncSmolVM.delete_snapshot()": "smolvm-async snapshot delete",
    "AsyncSmolVM.list()": "smolvm-async list",
    "AsyncSmolVM.snapshots()": "smolvm-async snapshot list",
    "attach to the VM with AsyncSmolVM.from_id()": "use that VM with smolvm-async exec ID",
    "start the kept VM with AsyncSmolVM.from_id()": "start it with smolvm-async run --id ID",
    "prune()": "smolvm-async prune",
    "open_terminal()": "a terminal (shell, --tty)",
    "from_id() and from_snapshot()": "run --id and snapshot restore",
    "spawn(detached=True)": "exec --detach",
    "spawn()": "exec ID -- COMMAND",
    **{f"{verb}()": verb for verb in ("delete", "start", "stop")},
}


def in_options(message: str) -> str:
    """Return a message of the library with options: `--accel tcg` instead of `accel='tcg'`."""

    def option(found: re.Match[str]) -> str:
        value = shlex.quote(found["text"]) if found["text"] is not None else found["number"] or ""
        return f"--{OPTIONS[found['name']]} {value}".rstrip()

    value = r"(?:'(?P<text>[^'\n]*)'|(?P<number>-?\d+(?:\.\d+)?|nan|inf)|True)?"
    message = re.sub(rf"\b(?P<name>{'|'.join(OPTIONS)})={value}", option, message)
    calls = "|".join(map(re.escape, COMMANDS))
    return re.sub(rf"(?<![\w.])(?:{calls})", lambda call: COMMANDS[call[0]], message)


def say(text: str) -> None:
    """Write text to stdout."""
    out.print(Text(printable(text)), soft_wrap=True)


def complain(word: str, text: str, style: str) -> None:
    """Write a message to stderr, with a coloured word before it."""
    err.print(Text.assemble((f"{word}: ", style), printable(text)), soft_wrap=True)


def write_json(document: object) -> None:
    """Write a JSON document to stdout, on one line."""
    out.print(json.dumps(document, default=str), soft_wrap=True)


def write_text(text: str) -> None:
    """Write a guest's text to stdout; for a terminal, remove control sequences."""
    if sys.stdout is not None:
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def write_bytes(content: bytes) -> None:
    """Write bytes to stdout."""
    if sys.stdout is not None:
        sys.stdout.buffer.write(content)
        sys.stdout.flush()


def show_table(columns: Mapping[str, Any], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout.

    Args:
        columns: For each column's title, the arguments of rich's `add_column()`.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, arguments in columns.items():
        table.add_column(title, **arguments)
    for row in rows:
        table.add_row(*(Text(printable(cell).replace("\n", " ")) for cell in row))
    out.print(table)


def show_infos(kind: type, infos: Sequence[object]) -> None:
    """Write a table with a column for each field of `kind`, the class of all `infos`.

    Leave out an `OPTIONAL` column that would be empty.
    """
    names = [
        name
        for name in kind.__annotations__
        if name not in OPTIONAL or any(_cell(info, name) != "-" for info in infos)
    ]
    columns = {
        name.removeprefix("vm_").upper(): STYLES.get(
            name, RIGHT if str(kind.__annotations__[name]).startswith(("int", "float")) else LEFT
        )
        for name in names
    }
    show_table(columns, [[_cell(info, name) for name in names] for info in infos])


def _cell(info: object, name: str) -> str:
    value = getattr(info, name)
    if name == "age":
        return _age(value)
    if name in ("memory", "resident"):
        return "-" if value is None else f"{value} MiB"
    if name == "processors":
        return "-" if value is None else f"{value:.2f}"
    if name == "size":
        return in_units(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}={text}" for key, text in value.items()) or "-"
    return "-" if value is None else str(value)


def _age(seconds: float) -> str:
    """Format seconds in the largest unit that fits at least once."""
    length, unit = next((unit for unit in AGES if seconds >= unit[0]), AGES[-1])
    return f"{seconds // length:.0f} {unit}"


def in_units(size: float) -> str:
    """Format a number of bytes in the largest unit that fits at least once."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@contextmanager
def busy(text: str, *, json: bool, console: Screen = out) -> Iterator[Callable[[str], None]]:
    """Show a text and the elapsed time on a terminal; yield a function that changes the text."""
    if json or not console.is_interactive:
        yield lambda text: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda text: bar.update(task, description=printable(text))


@contextmanager
def transfer(text: str, *, json: bool) -> Iterator[progress.ProgressCallback]:
    """Show the progress of a transfer on a terminal; yield the callback for the progress."""
    if json or not out.is_interactive:
        yield lambda step: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

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


def describe_ending(vm_id: str, report: ShutdownReport) -> str:
    """Return a sentence that says how a VM ended."""
    return f"{vm_id} has stopped: {ENDINGS[report.rung]} ({report.rung}, {report.seconds:.2f} s)."


def ending_fields(vm_id: str, report: ShutdownReport) -> dict[str, Any]:
    """Return the fields for JSON that say how a VM ended, with all rungs that were tried."""
    return {"vm_id": vm_id, "graceful": report.graceful, **asdict(report)}
