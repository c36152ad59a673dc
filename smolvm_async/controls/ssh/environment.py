"""The environment variables of all commands, in a file in the home of the guest's user."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from smolvm_async.config.checks import check_env, shown
from smolvm_async.controls.ssh.commands import Reach
from smolvm_async.controls.ssh.files import explained
from smolvm_async.controls.ssh.script import ENV_FILE, exports, parse_exports
from smolvm_async.errors import ConfigError, FileTransferError

if TYPE_CHECKING:
    from asyncssh import SFTPClient

FILE = f"the variables in ~/{ENV_FILE}"  # for messages


class Environment:
    """The variables of every later command. They last as long as the guest's disk."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._turn = asyncio.Lock()

    async def set(self, env: Mapping[str, str], *, merge: bool = True) -> list[str]:
        """See `AsyncSmolVM.set_env_vars()`."""
        wanted = check_env(env, "env_vars")
        link = await self._reach()
        async with self._turn, explained(link, FILE), link.sftp() as sftp:
            known = await _read(sftp) if merge else {}
            await _write(sftp, {**known, **wanted})
        return sorted({**known, **wanted})

    async def unset(self, names: Iterable[str]) -> dict[str, str]:
        """See `AsyncSmolVM.unset_env_vars()`."""
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ConfigError(f"names={shown(names)} is wrong: pass a list of variable names.")
        wanted = list(check_env(dict.fromkeys(names, ""), "names"))
        link = await self._reach()
        async with self._turn, explained(link, FILE), link.sftp() as sftp:
            known = await _read(sftp)
            removed = {name: known.pop(name) for name in wanted if name in known}
            if removed:
                await _write(sftp, known)
        return removed

    async def list(self) -> dict[str, str]:
        """See `AsyncSmolVM.list_env_vars()`."""
        link = await self._reach()
        async with explained(link, FILE), link.sftp() as sftp:
            return await _read(sftp)


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
