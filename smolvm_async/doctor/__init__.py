"""Examines the host for each guest OS by doing what a VM does, not by looking at versions."""

from __future__ import annotations

import os
from typing import Literal

from smolvm_async.config.vm_config import make_config
from smolvm_async.doctor import programs, space
from smolvm_async.doctor.findings import Finding, Notebook, Outcome, Report, needs
from smolvm_async.doctor.guest import examine_guest
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.guests.windows import WINDOWS

__all__ = ["Finding", "Outcome", "Report", "examine"]


async def examine(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    accel: Literal["auto", "kvm", "tcg"] = "auto",
    on_progress: ProgressCallback | None = None,
) -> Report:
    """Examine this host. It takes some seconds, and leaves nothing behind when cancelled.

    Args:
        data_dir: Where VMs would keep their files; the default is theirs.
        accel: The accelerator that VMs would ask for.
        on_progress: Called with a `Progress` for each check.

    Returns:
        The findings; no check raises, whatever it meets.

    Raises:
        ConfigError: An argument is wrong.
    """
    # Any image will do: the two arguments are checked as a VM's are.
    config = make_config(os=WINDOWS.name, image="none", accel=accel, data_dir=data_dir)
    notebook, place = Notebook(on_progress), config.data_dir
    await notebook.check("kernel", programs.check_kernel)
    await notebook.check("python", programs.check_python)
    obstacle = ""
    if not await notebook.check("setpriv", programs.check_setpriv):
        obstacle = needs("setpriv")
    no_place = ""
    if not await notebook.check("data-dir", lambda: space.check_data_dir(place)):
        no_place = needs("data-dir")
    if not await notebook.check("disk", lambda: space.check_disk(place), obstacle=no_place):
        no_place = no_place or needs("disk")
    # What its guests need is what others need, and more.
    await examine_guest(notebook, WINDOWS, place, accel, obstacle or no_place)
    return Report(findings=tuple(notebook.findings))
