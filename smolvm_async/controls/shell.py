"""Commands and files in a Linux guest, over SSH."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, overload

from smolvm_async.controls.observation import Observation
from smolvm_async.events import BootState
from smolvm_async.handle import running
from smolvm_async.progress import ProgressCallback
from smolvm_async.ssh.commands import Commands, ShellKind
from smolvm_async.ssh.lines import LineStream
from smolvm_async.ssh.link import Link
from smolvm_async.ssh.result import CommandResult


class Shell(Observation):
    """`AsyncSmolVM`'s commands and files. Each waits until the guest is `ready`."""

    _commands: Commands

    def _make_shell(self) -> None:
        self._commands = Commands(self)

    async def link(self) -> Link:
        """The SSH connection, once the guest is ready.

        Raises:
            VMTimeoutError: It was not ready within `Timeouts.boot`.
            VMNotRunningError: It does not run.
            VMCrashedError: It crashed before.
        """
        running(self._vm)
        await self.wait_for(BootState.READY)
        return running(self._vm).link

    def _require(self, feature: str) -> None:
        self._vm.config.profile.require(feature)
        running(self._vm)

    @overload
    async def run(
        self,
        command: str,
        timeout: float | None = 30,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
        check: bool = False,
        text: Literal[True] = True,
    ) -> CommandResult[str]: ...

    @overload
    async def run(
        self,
        command: str,
        timeout: float | None = 30,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
        check: bool = False,
        *,
        text: Literal[False],
    ) -> CommandResult[bytes]: ...

    async def run(
        self,
        command: str,
        timeout: float | None = 30,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
        check: bool = False,
        text: bool = True,
    ) -> CommandResult[Any]:
        """Run a command in the guest, over SSH, to its end.

        Cancelled, it kills the command: on the guest, all of its process group.

        Args:
            command: What the user's shell is to run.
            timeout: Seconds from its start until it is killed; `None` sets no bound.
            env: Variables for it, besides those of `set_env_vars()`; they are on no command line.
            shell: `"raw"`: the user's shell runs it as it is. `"login"`: a login shell does, which
                reads its profile first.
            input: Its standard input; by default it has none.
            check: Whether another exit code than 0 is an error.
            text: Whether the output is text (what is no UTF-8 is shown as U+FFFD), or bytes.

        Returns:
            Exit code, output and duration.

        Raises:
            CommandTimeoutError: It took too long, and was killed; with what it had printed.
            CommandFailedError: `check`, and its exit code is not 0.
            ConnectionLostError: The guest was reset or ended meanwhile, or its SSH server was.
            VMTimeoutError: The guest was not ready within `Timeouts.boot`.
            VMNotRunningError: The VM does not run.
            ConfigError: An argument is wrong, or this is a Windows guest (a `ValueError`).
        """
        self._require("run")
        arguments: Any = (command, timeout, env, shell, input, check)
        return await self._commands.run(*arguments, text=text)  # type: ignore[call-overload, no-any-return]

    def run_stream(
        self,
        command: str,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        shell: ShellKind = "raw",
        input: str | bytes | None = None,
    ) -> AbstractAsyncContextManager[LineStream]:
        """Run a command and read what it prints, line by line, as it comes.

        ::

            async with vm.run_stream("apt-get install -y ffmpeg") as lines:
                async for line in lines:
                    print(line.stream, line.text)
            print(lines.exit_code)

        Leaving the block kills the command, if it still runs. Whoever reads slowly slows it down;
        nothing is lost, and at most some MiB are held here. A line of over 1 MiB comes in pieces.

        Args:
            command, timeout, env, shell, input: See `run()`; by default there is no timeout.

        Raises:
            CommandTimeoutError, ConnectionLostError: From the iteration; see `run()`.
            VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("run_stream")
        return self._commands.stream(command, timeout, env, shell, input)
