"""The program `smolvm-async`, with all its commands."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from smolvm_async.cli.command import FAILED
from smolvm_async.cli.output import complain, err, in_options, say, write_nowhere
from smolvm_async.foundation.log import get_logger

NAME = "smolvm-async"
EPILOG = """
Exit codes: 0 success; 1 failure, or the VM crashed; 2 wrong usage or argument; 3 the host lacks
something; 4 no VM or snapshot has this name; 128+n interrupted by signal n (130: Ctrl-C).

With --json, stdout is JSON: one document, or one on each line. An error is the last document:
{"error": {"type": ..., "message": ...}}. Wrong usage is text on stderr.
"""

# Where the commands are in this folder, in the order of the help. Only the module of the command
# that runs is imported: to prepare the options of all commands takes longer than a command.
COMMANDS = {
    "run": "run.run",
    "list": "vms.list_vms",
    "exec": "exec.exec_command",
    "shell": "exec.shell",
    "cp": "copy.cp",
    "forward": "ports.forward",
    "ssh-config": "ports.ssh_config",
    "stop": "vms.stop",
    "pause": "vms.pause",
    "resume": "vms.resume",
    "delete": "vms.delete",
    "prune": "vms.prune",
    "logs": "logs.logs",
    "events": "events.events",
    "stats": "stats.stats",
    "info": "info.info",
    "network": "internet.network",
    "screenshot": "desktop.screenshot",
    "vnc": "desktop.vnc",
    "fork": "snapshot.fork",
    "snapshot": "snapshot.snapshot",
    "image": "image.image",
    "mcp": "mcp.mcp",
    "doctor": "doctor.doctor",
}


class WithCommand(TyperCommand):
    """A command whose argument COMMAND has all words after `--`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words before `--`."""
        end = args.index("--") if "--" in args else len(args)
        rest = super().parse_args(ctx, args[:end])
        ctx.params["command"] = [*(ctx.params["command"] or ()), *args[end + 1 :]]
        return rest


PARSING: dict[str, dict[str, Any]] = {
    "run": {"cls": WithCommand},
    "exec": {
        "context_settings": {"allow_interspersed_args": False, "ignore_unknown_options": True}
    },
}


class Commands(TyperGroup):
    """The commands of the program, each made when it is needed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = dict.fromkeys(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Make a command; return `None` if there is none with this name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name].partition(".")
        found = getattr(import_module(f"smolvm_async.cli.{module}"), function)
        if isinstance(found, typer.Typer):
            return get_command(found)
        alone = typer.Typer(add_completion=False, rich_markup_mode="markdown")
        alone.command(cmd_name, **PARSING.get(cmd_name, {}))(found)
        return get_command(alone)


app = typer.Typer(
    name=NAME,
    cls=Commands,
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
        from rich.logging import RichHandler

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
