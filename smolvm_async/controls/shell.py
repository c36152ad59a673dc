"""Commands and files in a Linux guest, over SSH."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, overload

from smolvm_async.controls.interface import running
from smolvm_async.controls.observation import Observation
from smolvm_async.controls.ssh.commands import Commands, ShellKind
from smolvm_async.controls.ssh.environment import Environment
from smolvm_async.controls.ssh.files import Files
from smolvm_async.controls.ssh.lines import LineStream
from smolvm_async.controls.ssh.link import Link
from smolvm_async.controls.ssh.result import CommandResult
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.qemu.events import BootState


class Shell(Observation):
    """`AsyncSmolVM`'s commands and files. Each waits until the guest is `ready`."""

    _commands: Commands
    _files: Files
    _environment: Environment

    def _make_shell(self) -> None:
        self._commands = Commands(self._reach)
        self._files = Files(self._reach)
        self._environment = Environment(self._reach)

    async def _reach(self) -> Link:
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
        return await self._commands.run(command, timeout, env, shell, input, check, text)

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

    async def upload_file(
        self,
        local_path: str | os.PathLike[str],
        guest_path: str,
        *,
        make_dirs: bool = True,
        on_progress: ProgressCallback | None = None,
    ) -> str:
        """Copy a file, or a directory with all that is in it, into the guest.

        It arrives under a temporary name beside the final one, which it gets when it is whole; a
        directory that is there already is merged with. Modes and times are kept, links stay links.

        Args:
            local_path: What to copy; `~` is expanded.
            guest_path: Where to, absolute. If it is a directory, or ends with a slash, the name
                of what is copied is added.
            make_dirs: Whether to make the directories above it.
            on_progress: Called with a `Progress` in bytes, some ten times a second.

        Returns:
            The path in the guest.

        Raises:
            FileTransferError: It failed: a disk is full, a permission is missing, ...
            ConnectionLostError, VMTimeoutError, VMNotRunningError, ConfigError: See `run()`.
        """
        self._require("upload_file")
        return await self._files.upload(
            local_path, guest_path, make_dirs=make_dirs, on_progress=on_progress
        )

    async def download_file(
        self,
        guest_path: str,
        local_path: str | os.PathLike[str],
        *,
        make_dirs: bool = True,
        max_bytes: int | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> Path:
        """Copy a file or a directory out of the guest, as `upload_file()` does into it.

        Nothing that the guest names is followed out of `local_path`; set-user-id bits are dropped.

        Args:
            guest_path: What to copy, absolute.
            local_path: Where to; see `guest_path` of `upload_file()`.
            make_dirs: Whether to make the directories above it.
            max_bytes: Refuse more than that.
            on_progress: See `upload_file()`.

        Returns:
            The path here.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("download_file")
        return await self._files.download(
            guest_path,
            local_path,
            make_dirs=make_dirs,
            max_bytes=max_bytes,
            on_progress=on_progress,
        )

    async def set_env_vars(self, env_vars: Mapping[str, str], *, merge: bool = True) -> list[str]:
        """Set environment variables of all later commands.

        They are kept in the guest, in `~/.smolvm_env.sh`, which nobody else there can read.

        Args:
            env_vars: By name.
            merge: Whether those that were set before stay.

        Returns:
            The names of all that are set now, sorted.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("set_env_vars")
        return await self._environment.set(env_vars, merge=merge)

    async def unset_env_vars(self, names: Iterable[str]) -> dict[str, str]:
        """Remove environment variables that `set_env_vars()` has set.

        Returns:
            Those that there were, with their values.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("unset_env_vars")
        return await self._environment.unset(names)

    async def list_env_vars(self) -> dict[str, str]:
        """The environment variables that `env=` and `set_env_vars()` have set.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("list_env_vars")
        return await self._environment.list()
