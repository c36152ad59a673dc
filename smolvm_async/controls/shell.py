"""Commands and files in a Linux guest, over SSH."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, overload

from smolvm_async.controls.interface import running
from smolvm_async.controls.observation import Observation
from smolvm_async.controls.ssh.commands import CommandResult, Commands, LineStream, ShellKind
from smolvm_async.controls.ssh.environment import Environment
from smolvm_async.controls.ssh.files import Files
from smolvm_async.controls.ssh.link import Link
from smolvm_async.foundation.progress import ProgressCallback
from smolvm_async.qemu.events import BootState


class Shell(Observation):
    """`AsyncSmolVM`'s commands and files. Each method waits until the guest is `ready`."""

    _commands: Commands
    _files: Files
    _environment: Environment

    def _make_shell(self) -> None:
        self._commands = Commands(self._reach)
        self._files = Files(self._reach)
        self._environment = Environment(self._reach)

    async def _reach(self) -> Link:
        """Return the SSH connection as soon as the guest is ready.

        Raises:
            VMTimeoutError: The guest was not ready within `Timeouts.boot`.
            VMNotRunningError: The VM is not running.
            VMCrashedError: The VM crashed before that.
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
        """Run a command in the guest over SSH, and wait for its end.

        Cancelling the call kills the command and the rest of its process group in the guest.

        Args:
            command: A command for the user's shell.
            timeout: Seconds from the start of the command until it is killed; `None` for no limit.
            env: Variables for this command, in addition to those of `set_env_vars()`. They never
                appear on a command line.
            shell: `"raw"`: the user's shell runs the command as it is. `"login"`: a login shell,
                which reads the user's profile first, runs it.
            input: The standard input of the command; empty by default.
            check: Whether an exit code other than 0 is an error.
            text: Whether the output is text (invalid UTF-8 becomes U+FFFD) or bytes.

        Returns:
            Exit code, output and duration.

        Raises:
            CommandTimeoutError: The command took too long and was killed; has its output so far.
            CommandFailedError: `check` is true, and the exit code is not 0.
            ConnectionLostError: The guest or its SSH server was reset, or ended.
            VMTimeoutError: The guest was not ready within `Timeouts.boot`.
            VMNotRunningError: The VM is not running.
            ConfigError: An argument is wrong, or the guest is Windows (a `ValueError`).
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
        """Run a command and read its output line by line, as the command prints it.

        ::

            async with vm.run_stream("apt-get install -y ffmpeg") as lines:
                async for line in lines:
                    print(line.stream, line.text)
            print(lines.exit_code)

        Leaving the block kills the command if it is still running. A slow reader slows the command
        down: no output is lost, and at most a few MiB are kept in memory. A line of more than 1 MiB
        comes in pieces.

        Args:
            command, timeout, env, shell, input: See `run()`; there is no timeout by default.

        Raises:
            CommandTimeoutError, ConnectionLostError: During the iteration; see `run()`.
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
        """Copy a file, or a directory with its contents, into the guest.

        The copy has a temporary name beside the final one until it is complete. A directory that
        exists is merged with. Modes and times are kept, links stay links.

        Args:
            local_path: The file or directory to copy; `~` is expanded.
            guest_path: The absolute path to copy to. If it is a directory, or ends with a slash,
                the name of the copied file or directory is added.
            make_dirs: Whether to make missing directories above `guest_path`.
            on_progress: Called with a `Progress` in bytes, about ten times a second.

        Returns:
            The path in the guest.

        Raises:
            FileTransferError: The copy failed: a disk is full, a permission is missing, ...
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
        """Copy a file or a directory out of the guest. See `upload_file()`.

        No name or link from the guest can lead out of `local_path`; set-user-id bits are dropped.

        Args:
            guest_path: The absolute path of the file or directory to copy.
            local_path: The path to copy to; see `guest_path` of `upload_file()`.
            make_dirs: Whether to make missing directories above `local_path`.
            max_bytes: Fail if there are more bytes than this.
            on_progress: See `upload_file()`.

        Returns:
            The path on the host.

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
        """Set environment variables for all later commands.

        They are stored in the guest, in `~/.smolvm_env.sh`, which only this user can read.

        Args:
            env_vars: The values, by name.
            merge: Whether to keep the variables that were set before.

        Returns:
            The names of all variables that are set now, sorted.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("set_env_vars")
        return await self._environment.set(env_vars, merge=merge)

    async def unset_env_vars(self, names: Iterable[str]) -> dict[str, str]:
        """Remove environment variables that `set_env_vars()` has set.

        Returns:
            The variables that were removed, with their values.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("unset_env_vars")
        return await self._environment.unset(names)

    async def list_env_vars(self) -> dict[str, str]:
        """Return the environment variables that `env=` and `set_env_vars()` have set.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("list_env_vars")
        return await self._environment.list()
