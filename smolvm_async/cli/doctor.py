"""`doctor`: check whether this host can run the guests, and show how to fix it."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated

import typer
from rich.text import Text

from smolvm_async import Progress
from smolvm_async.cli.command import FAILED, DataDir, Json, execute
from smolvm_async.cli.output import busy, in_options, out, write_json
from smolvm_async.config.checks import AccelName


def doctor(
    accel: Annotated[
        AccelName, typer.Option(help="The accelerator that VMs would ask for.")
    ] = "auto",
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Check this host by doing a VM's work. This takes some seconds and leaves nothing behind."""
    from smolvm_async.doctor import Finding, Outcome, examine  # only this command needs it

    marks = {
        Outcome.OK: ("✔", "green"),
        Outcome.WARNING: ("!", "yellow"),
        Outcome.FAILED: ("✘", "bold red"),
        Outcome.SKIPPED: ("-", "dim"),
    }

    def show(finding: Finding) -> None:
        mark, style = marks[finding.status]
        detail, cure = in_options(finding.detail), in_options(finding.cure)
        line = Text.assemble("  ", (mark, style), f" {finding.check:<{width}}  {detail}")
        out.print(line, soft_wrap=True)
        if cure:
            out.print(Text(f"    {'':<{width}}  {cure}", style), soft_wrap=True)

    with busy("Examining", json=json) as tell:

        def on_progress(progress: Progress) -> None:
            tell(f"Examining {progress.message}")

        report = execute(
            examine(data_dir=data_dir, accel=accel, on_progress=on_progress), json=json
        )
    if json:
        write_json(report.model_dump(mode="json"))
    else:
        width = max(len(finding.check) for finding in report.findings)
        for guest, findings in groupby(report.findings, lambda finding: finding.guest):
            out.print(Text(f"{guest} guests" if guest else "this host", "bold"))
            for finding in findings:
                show(finding)
    if not report.ok:
        raise typer.Exit(FAILED)
