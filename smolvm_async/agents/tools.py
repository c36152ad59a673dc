"""The tools of the MCP server: each public method of `Tools` is one.

The docstrings, the names and the types are what the model reads. A method returns texts and
pictures; errors are `SmolVMError`s, whose message is for the model.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import codecs
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from smolvm_async.agents.output import PAGE, Output
from smolvm_async.agents.sandboxes import Sandbox, Sandboxes
from smolvm_async.controls.commands.processes import GuestProcess
from smolvm_async.controls.desktop.picture import Screenshot
from smolvm_async.errors import ConfigError, VMTimeoutError

Content: TypeAlias = list[str | Screenshot]
Id = Annotated[str, Field(description="The sandbox's id, from create_sandbox.")]
Pixel = Annotated[int, Field(description="A pixel of the whole screenshot.")]
Encoding = Annotated[
    Literal["utf-8", "base64"], Field(description="utf-8 for text, base64 for anything else.")
]
Path = Annotated[str, Field(description="An absolute path in the sandbox.")]
WAIT = 30.0  # seconds, for the screen or a command


async def _feed(process: GuestProcess, stdin: str) -> None:
    await process.write(stdin)
    process.close_input()


async def _collect(stream: asyncio.StreamReader, output: Output) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while data := await stream.read(1 << 16):
        output.add(decoder.decode(data))
    output.add(decoder.decode(b"", final=True))


class Tools:
    """The tools of one session."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self._sandboxes = sandboxes

    async def create_sandbox(
        self,
        os: Annotated[Literal["linux", "windows"], Field(description="The guest OS.")] = "linux",
        memory: Annotated[int | None, Field(description="MiB; the guest OS's default")] = None,
        snapshot: Annotated[
            str | None, Field(description="Start from this snapshot; os and memory are its own.")
        ] = None,
    ) -> Content:
        """Start a sandbox: a virtual machine of its own, deleted at the end of the session.

        Linux is a small Debian with python3 and git, in which you are root; in Windows, you are
        LocalSystem. A sandbox that boots is
        not ready at once: commands wait for it, and wait_for_screen shows what it does.
        """
        if snapshot is not None:
            return [self._line(await self._sandboxes.restore(snapshot))]
        return [self._line(await self._sandboxes.create(os, memory))]

    async def list_sandboxes(self) -> Content:
        """Show the sandboxes and snapshots of this session, and the limits."""
        sandboxes, limits = self._sandboxes.all(), self._sandboxes.limits
        memory = sum(sandbox.memory for sandbox in sandboxes)
        return [
            "\n".join(
                [
                    f"{len(sandboxes)} of at most {limits.max_sandboxes} sandboxes, with {memory} "
                    f"of at most {limits.max_memory} MiB",
                    *map(self._line, sandboxes),
                    f"snapshots: {', '.join(self._sandboxes.snapshots) or 'none'}",
                ]
            )
        ]

    def _line(self, sandbox: Sandbox) -> str:
        return (
            f"{sandbox.vm.vm_id}: {sandbox.guest}, {sandbox.memory} MiB, {sandbox.vm.status}, "
            f"deleted in {sandbox.left:.0f} s"
        )

    async def fork_sandbox(
        self,
        sandbox: Id,
        count: Annotated[int, Field(description="The number of copies.")] = 1,
    ) -> Content:
        """Start live copies of a sandbox, which goes on itself."""
        clones = await self._sandboxes.copy(self._sandboxes.find(sandbox), count)
        return ["\n".join(map(self._line, clones))]

    async def snapshot_sandbox(
        self,
        sandbox: Id,
        name: Annotated[str, Field(description="Lower-case letters, digits and hyphens.")],
    ) -> Content:
        """Save a sandbox as it is, with its memory, until the end of the session."""
        await self._sandboxes.snapshot(self._sandboxes.find(sandbox), name)
        return [f"saved: create_sandbox(snapshot={name!r}) starts a sandbox that goes on there"]

    async def delete_snapshot(self, name: str) -> Content:
        """Delete a snapshot of this session."""
        await self._sandboxes.delete_snapshot(name)
        return [f"{name} is deleted"]

    async def delete_sandbox(self, sandbox: Id) -> Content:
        """Delete a sandbox with everything in it."""
        await self._sandboxes.delete(self._sandboxes.find(sandbox))
        return [f"{sandbox} is deleted"]

    async def run_command(
        self,
        sandbox: Id,
        command: Annotated[str, Field(description="For the shell: sh; in Windows, PowerShell.")],
        timeout: Annotated[float, Field(description="Seconds until it is killed.")] = WAIT,
        stdin: Annotated[str, Field(description="The command's input.")] = "",
        cwd: Annotated[str | None, Field(description="The directory; else the home.")] = None,
    ) -> Content:
        """Run a command in a sandbox; return its exit code and output.

        Every command has a shell of its own: `cd` does not outlast it. Of a long output you get the
        beginning and the end; read_output shows the rest. For a program that goes on in the
        background, redirect its output: nohup ... > log 2>&1 &; in Windows, use Start-Process.
        """
        found = self._sandboxes.find(sandbox)
        self._check_time(timeout, "start it in the background: nohup ... > log 2>&1 &")
        output = found.output = Output()
        ended = f"killed after {timeout:g} s"
        # A Linux guest joins both streams, so that their order is kept.
        joined = command if found.guest == "windows" else f"exec 2>&1\n{command}"
        async with await found.vm.spawn(joined, cwd=cwd) as process:
            with suppress(TimeoutError):  # the output until then is worth more than an error
                async with asyncio.timeout(timeout):
                    async with asyncio.TaskGroup() as group:
                        group.create_task(_feed(process, stdin))
                        for stream in (process.stdout, process.stderr):
                            group.create_task(_collect(stream, output))
                    ended = f"exit code {await process.wait()}"
        more = f"read_output({sandbox!r}, offset={PAGE // 2}) shows them"
        return [f"{ended}\n{output.summary(more)}"]

    def _check_time(self, timeout: float, instead: str) -> None:
        most = self._sandboxes.limits.command_time
        if not 0 <= timeout <= most:
            raise ConfigError(
                f"timeout={timeout:g} is wrong: pass 0 to {most:g} seconds, or {instead}."
            )

    async def read_output(
        self, sandbox: Id, offset: Annotated[int, Field(ge=0, description="Characters.")] = 0
    ) -> Content:
        """Show more of the output of the sandbox's last command."""
        return [self._sandboxes.find(sandbox).output.page(offset)]

    async def read_file(
        self,
        sandbox: Id,
        path: Path,
        offset: Annotated[int, Field(ge=0, description="Bytes to skip.")] = 0,
        encoding: Encoding = "utf-8",
    ) -> Content:
        """Read a file of a sandbox, a page at a time."""
        vm = self._sandboxes.find(sandbox).vm
        data = await vm.read_file(path, text=False, offset=offset, length=PAGE + 1)
        more, data = len(data) > PAGE, data[:PAGE]
        if encoding == "base64":
            text, end = base64.b64encode(data).decode(), offset + len(data)
        else:  # a character may go on in the next page
            text, used = codecs.utf_8_decode(data, "replace", not more)
            end = offset + used
        if not more:
            return [text]
        return [text, f"[bytes {offset} to {end}: pass offset={end} for more]"]

    async def write_file(
        self, sandbox: Id, path: Path, content: str, encoding: Encoding = "utf-8"
    ) -> Content:
        """Write a file of a sandbox; make its directory if needed."""
        try:
            data = base64.b64decode(content) if encoding == "base64" else content.encode()
        except (binascii.Error, ValueError) as error:
            raise ConfigError(f"content is not {encoding}: {error}.") from error
        await self._sandboxes.find(sandbox).vm.write_file(path, data)
        return [f"{path}: {len(data)} bytes written"]

    async def screenshot(
        self,
        sandbox: Id,
        region: Annotated[
            tuple[int, int, int, int] | None,
            Field(description="Enlarge this part: left, top, right, bottom."),
        ] = None,
    ) -> Content:
        """Take a picture of the screen, from the firmware on."""
        found = self._sandboxes.find(sandbox)
        if region is not None:
            result = await found.computer.act({"action": "zoom", "region": list(region)})
            return [result.screenshot]
        return self._seen(found, await found.vm.screenshot())

    def _seen(self, sandbox: Sandbox, picture: Screenshot, *texts: str) -> Content:
        sandbox.seen = picture
        return [*texts, f"{picture.width}x{picture.height}", picture]

    async def wait_for_screen(
        self,
        sandbox: Id,
        changed: Annotated[
            bool, Field(description="Until it differs from the last picture you got.")
        ] = False,
        stable: Annotated[
            float | None, Field(description="Until it has not changed for so many seconds.")
        ] = 1.0,
        timeout: Annotated[float, Field(description="Seconds.")] = WAIT,
    ) -> Content:
        """Wait until the screen has changed or is stable, and return a picture of it."""
        found = self._sandboxes.find(sandbox)
        self._check_time(timeout, "wait again")
        since: bool | Screenshot = (found.seen or True) if changed else False
        try:
            picture = await found.vm.wait_for_screen(changed=since, stable=stable, timeout=timeout)
        except VMTimeoutError:
            late = f"the screen did not do so within {timeout:g} s; it shows:"
            return self._seen(found, await found.vm.screenshot(), late)
        return self._seen(found, picture)

    async def click(
        self,
        sandbox: Id,
        x: Pixel,
        y: Pixel,
        button: Literal["left", "middle", "right"] = "left",
        count: Annotated[int, Field(ge=1, le=3, description="2 for a double click.")] = 1,
        keys: Annotated[str, Field(description="Keys to hold meanwhile: ctrl+shift")] = "",
    ) -> Content:
        """Click, and return a picture of the screen afterwards."""
        names = {1: f"{button}_click", 2: "double_click", 3: "triple_click"}
        if count > 1 and button != "left":
            raise ConfigError(f"count={count} is wrong: only the left button clicks twice.")
        held = {"text": keys or None}
        return await self._act(sandbox, action=names[count], coordinate=[x, y], **held)

    async def type_text(self, sandbox: Id, text: str) -> Content:
        r"""Type a text, in which \n is Enter, and return a picture of the screen afterwards."""
        return await self._act(sandbox, action="type", text=text)

    async def press_keys(
        self,
        sandbox: Id,
        keys: Annotated[str, Field(description="Such as Return, ctrl+s, alt+F4, Page_Down.")],
        repeat: Annotated[int, Field(description="How many times.")] = 1,
    ) -> Content:
        """Press keys together, and return a picture of the screen afterwards."""
        return await self._act(sandbox, action="key", text=keys, repeat=repeat)

    async def scroll(
        self,
        sandbox: Id,
        x: Pixel,
        y: Pixel,
        direction: Literal["up", "down", "left", "right"] = "down",
        amount: Annotated[int, Field(description="Clicks of the wheel.")] = 3,
    ) -> Content:
        """Turn the wheel at a position, and return a picture of the screen afterwards."""
        turn = {"scroll_direction": direction, "scroll_amount": amount}
        return await self._act(sandbox, action="scroll", coordinate=[x, y], **turn)

    async def computer(
        self,
        sandbox: Id,
        action: Annotated[
            dict[str, Any],
            Field(
                description='Such as {"action": "left_click_drag", "start_coordinate": [1, 2], '
                '"coordinate": [3, 4]}, {"action": "hold_key", "text": "w", "duration": 2} or '
                '{"type": "drag", "path": [{"x": 1, "y": 2}, {"x": 3, "y": 4}]}.'
            ),
        ],
    ) -> Content:
        """Execute any action of Anthropic's or OpenAI's computer tool, and return the screen."""
        return await self._act(sandbox, **action)

    async def _act(self, sandbox: str, **action: Any) -> Content:
        found = self._sandboxes.find(sandbox)
        result = await found.computer.act(action)
        return self._seen(found, result.screenshot, *filter(None, [result.text]))
