"""A computer for computer-use models: a VM that executes the actions of such a model.

`smolvm_async.agents.Computer` takes actions as the vendors' SDKs give them, and returns a
screenshot after each of them. In an agent's loop:

    computer = Computer(vm)
    for call in calls:  # Anthropic's `tool_use` blocks, or OpenAI's `computer_call` items
        try:
            result = await computer.act(call)
        except ActionError as error:
            ...  # send str(error) back to the model
        image = base64.b64encode(result.screenshot.png).decode()  # an image of type image/png

Tell the model the size of the screen: 1280x800, unless you pass `resolution=`.

The script needs neither a model nor an image: it executes a list of actions in the set-up screens
of the firmware, and saves the screenshots.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from smolvm_async import AsyncSmolVM, SmolVMError, VMTimeoutError
from smolvm_async.agents import Computer

SETTLED = 1.0  # seconds without a change of the screen, after which the firmware waits for a key
SETUP = "=Select Entry"  # in the last line of OVMF's set-up
PATIENCE = 5.0  # seconds to wait for a change of the screen

SCRIPT: tuple[dict[str, Any], ...] = (  # actions that models might send for the firmware's set-up
    # Anthropic's computer tool, computer_20251124 and earlier.
    {"action": "screenshot"},
    {"action": "key", "text": "Down"},
    {"action": "key", "text": "Return"},
    {"action": "zoom", "region": [0, 0, 640, 400]},
    # Anthropic's computer_toolset_20260801: the name of the block is the action.
    {"type": "tool_use", "name": "key", "input": {"text": "Down", "repeat": 2}},
    {"type": "tool_use", "name": "wait", "input": {"duration": 1}},
    # OpenAI's computer tool: one action, and a call with several.
    {"type": "keypress", "keys": ["ESC"]},
    {
        "type": "computer_call",
        "actions": [
            {"type": "keypress", "keys": ["ARROWUP"]},
            {"type": "keypress", "keys": ["ENTER"]},
        ],
    },
)


async def enter_setup(vm: AsyncSmolVM) -> None:
    """Press Escape until the firmware shows its set-up, whose text is on the console, too."""
    await vm.wait_for_screen(changed=True)  # the firmware has begun to draw
    while True:
        shown = await vm.wait_for_screen(stable=SETTLED)
        if SETUP in vm.console_log():
            return
        await vm.keyboard.press("Escape")
        with contextlib.suppress(VMTimeoutError):
            await vm.wait_for_screen(changed=shown, timeout=PATIENCE)


async def look_around(image: Path, pictures: Path) -> None:
    """Execute the actions in the firmware's set-up, and save the screenshots."""
    async with AsyncSmolVM(os="windows", image=image) as vm:
        print("The firmware starts, and finds an empty disk.", flush=True)
        await enter_setup(vm)
        computer = Computer(vm)
        for number, action in enumerate(SCRIPT):
            picture = (await computer.act(action)).screenshot
            file = pictures / f"{number}.png"
            picture.save(file)
            print(f"{file}: {picture.width}x{picture.height}  after {action}", flush=True)
        await vm.stop(timeout=0)  # the firmware ignores the power button


def main(pictures: Path) -> None:
    """Create an empty disk and the directory for the screenshots, and run the example."""
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "empty.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
        asyncio.run(look_around(image, pictures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pictures",
        type=Path,
        default=Path("pictures"),
        help="directory for the screenshots (default pictures)",
    )
    try:
        main(parser.parse_args().pictures)
    except SmolVMError as error:
        sys.exit(f"{type(error).__name__}: {error}")
