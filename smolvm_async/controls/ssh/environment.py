"""The environment variables of all commands, in a file in the home of the guest's user."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from smolvm_async.config.checks import check_env, shown
from smolvm_async.controls.commands.script import ENV_FILE, exports, parse_exports
from smolvm_async.controls.ssh.files import explained
from smolvm_async.controls.ssh.link import Link, OverSSH
from smolvm_async.errors import ConfigError, FileTransferError

if TYPE_CHECKING:
    from asyncssh import SFTPClient

FILE = f"the variables in ~/{ENV_FILE}"  # for messages


class Environment(OverSSH):
    """`AsyncSmolVM`'s environment variables for all later commands, kept on the guest's disk."""

    async def set_env_vars(self, env_vars: Mapping[str, str], *, merge: bool = True) -> list[str]:
        """Set environment variables for all later commands.

        The guest keeps the variables in `~/.smolvm_env.sh`, which only this user can read.

        Args:
            env_vars: The values, by name.
            merge: Whether to keep the variables that were set before.

        Returns:
            The names of all variables that are set now, sorted.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("set_env_vars")
        checked = check_env(env_vars, "env_vars")
        return await set_variables(await self._reach(), checked, merge=merge)

    async def unset_env_vars(self, names: Iterable[str]) -> dict[str, str]:
        """Remove environment variables that `set_env_vars()` has set.

        Returns:
            The variables that were removed, with their values.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("unset_env_vars")
        listed = None if isinstance(names, str) or not isinstance(names, Iterable) else [*names]
        if listed is None or not all(isinstance(name, str) for name in listed):
            raise ConfigError(f"names={shown(names)} is wrong: pass a list of variable names.")
        wanted = list(check_env(dict.fromkeys(listed, ""), "names"))
        link = await self._reach()
        async with link.env_turn, explained(link, FILE), link.sftp() as sftp:
            known = await _read(sftp)
            removed = {name: known.pop(name) for name in wanted if name in known}
            if removed:
                await _write(sftp, known)
        return removed

    async def list_env_vars(self) -> dict[str, str]:
        """Return the environment variables that `env=` and `set_env_vars()` have set.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("list_env_vars")
        link = await self._reach()
        async with explained(link, FILE), link.sftp() as sftp:
            return await _read(sftp)


async def set_variables(link: Link, env: Mapping[str, str], *, merge: bool = True) -> list[str]:
    """Set variables; return the names of all variables that are set now, sorted."""
    async with link.env_turn, explained(link, FILE), link.sftp() as sftp:
        known = await _read(sftp) if merge else {}
        await _write(sftp, {**known, **env})
    return sorted({**known, **env})


async def _read(sftp: SFTPClient) -> dict[str, str]:
    from asyncssh import SFTPNoSuchFile

    try:
        async with sftp.open(ENV_FILE, "rb") as file:
            content = await file.read()
        assert isinstance(content, bytes)
        return parse_exports(content.decode(errors="surrogateescape"))
    except SFTPNoSuchFile:
        return {}
    except ValueError as error:
        raise FileTransferError(
            f"the file was changed by another program: {error}.",
            hint="Remove the file in the guest, and set the variables again.",
        ) from error


async def _write(sftp: SFTPClient, env: Mapping[str, str]) -> None:
    from asyncssh import SFTPAttrs

    new = f"{ENV_FILE}.{secrets.token_hex(4)}"
    async with sftp.open(new, "xb", attrs=SFTPAttrs(permissions=0o600)) as file:
        await file.write(exports(env).encode(errors="surrogateescape"))
    await sftp.posix_rename(new, ENV_FILE)
