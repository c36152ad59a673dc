"""The program `smolvm-async`, with all its commands."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer
from rich.logging import RichHandler

from smolvm_async.cli.command import FAILED
from smolvm_async.cli.copy import cp
from smolvm_async.cli.desktop import screenshot, vnc
from smolvm_async.cli.doctor import doctor
from smolvm_async.cli.events import events
from smolvm_async.cli.exec import COMMAND, exec_command, shell
from smolvm_async.cli.image import image
from smolvm_async.cli.internet import network
from smolvm_async.cli.logs import logs
from smolvm_async.cli.mcp import mcp
from smolvm_async.cli.output import complain, err, in_options, say, write_nowhere
from smolvm_async.cli.ports import forward, ssh_config
from smolvm_async.cli.run import WithCommand, run
from smolvm_async.cli.snapshot import fork, snapshot
from smolvm_async.cli.stats import stats
from smolvm_async.cli.vms import delete, list_vms, pause, prune, resume, stop
from smolvm_async.foundation.log import get_logger

NAME = "smolvm-async"
EPILOG = """
Exit codes: 0 success; 1 failure, or the VM crashed; 2 wrong usage or argument; 3 the host lacks
something; 4 no VM or snapshot has this name; 128+n interrupted by signal n (130: Ctrl-C).

With --json, stdout is JSON: one document, or one on each line. An error is the last document:
{"error": {"type": ..., "message": ...}}. Wrong usage is text on stderr.
"""

app = typer.Typer(
    name=NAME,
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=WithCommand)(run)
app.command("list")(list_vms)
app.command("exec", context_settings=COMMAND)(exec_command)
app.command("ssh-config")(ssh_config)
for command in (
    *(shell, cp, forward, stop, pause, resume, delete, prune),
    *(logs, events, stats, network, screenshot, vnc, fork, mcp, doctor),
):
    app.command()(command)
app.add_typer(snapshot, name="snapshot")
app.add_typer(image, name="image")


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"{NAME} {version('smolvm-async')}")
        raise typer.Exit


@app.callback()
def set_up(
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Log to stderr, with QEMU's command line."),
    ] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Disposable computers: Linux and Windows 11 sandboxes in QEMU."""
    handler: logging.Handler
    if err.is_terminal:
        handler, form = RichHandler(console=err, show_path=False), "%(message)s"
    else:
        handler, form = logging.StreamHandler(), "%(levelname)s: %(message)s"
    logging.basicConfig(format=form, handlers=[handler])
    if verbose:
        get_logger("smolvm_async").setLevel(logging.DEBUG)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    complain("Warning", in_options(str(message)), "bold yellow")


def main() -> None:
    """Run the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may not be UTF-8
    try:
        app(prog_name=NAME)
    except OSError as error:  # stdout cannot be written, as on a full disk
        write_nowhere()
        complain("Error", f"stdout: {error.strerror}", "bold red")
        sys.exit(FAILED)
