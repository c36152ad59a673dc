"""Make the README's pictures from a real run: examples/terminal.svg and examples/desktop.png.

python examples/pictures.py
"""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from smolvm_async import AsyncSmolVM

HERE = Path(__file__).parent
WIDTH = 100  # columns
LOGO = (1280, 800)  # pixels: the screen's size while the firmware shows its logo
COMMANDS = (
    ["smolvm-async", "run", "--", "python3", "-c", "print(6 * 7)"],
    ["smolvm-async", "run", "-d", "--os", "linux", "--id", "demo"],
    ["smolvm-async", "exec", "demo", "--", "sh", "-c", "hostname; head -n 1 /etc/os-release"],
    ["smolvm-async", "list"],
    ["smolvm-async", "delete", "demo"],
    ["python", "examples/fleet.py", "--size", "6"],
)


def record(console: Console) -> None:
    """Run the commands in turn, and write each command and its output on the console."""
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join((scripts, os.environ["PATH"]))
    env = os.environ | {"PATH": path, "COLUMNS": str(WIDTH)}
    for words in COMMANDS:
        console.print(Text("$ ", "bold green") + Text(shlex.join(words), "bold"))
        ended = subprocess.run(words, env=env, cwd=HERE.parent, stdout=subprocess.PIPE, check=True)
        console.print(Text(ended.stdout.decode()))


async def photograph(disk: Path, path: Path) -> None:
    """Open the firmware's menu of a Windows-class VM with the keyboard, and save the screen."""
    async with AsyncSmolVM(os="windows", image=disk) as vm:
        picture = await vm.wait_for_screen(stable=2.0)
        while picture.size != LOGO:
            picture = await vm.wait_for_screen(changed=picture, stable=2.0)
        while picture.size == LOGO:  # "Press any key to enter the Boot Manager Menu."
            await vm.keyboard.press("enter")
            picture = await vm.wait_for_screen(stable=2.0)
        await vm.keyboard.press("enter")
        picture = await vm.wait_for_screen(changed=picture, stable=2.0)
        picture.save(path)


if __name__ == "__main__":
    console = Console(record=True, width=WIDTH, force_terminal=True, file=sys.stdout)
    record(console)
    console.save_svg(str(HERE / "terminal.svg"), title="smolvm_async")
    with tempfile.TemporaryDirectory() as directory:
        blank = Path(directory, "blank.qcow2")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", blank, "64M"], check=True)
        asyncio.run(photograph(blank, HERE / "desktop.png"))
