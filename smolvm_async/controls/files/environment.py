"""The environment variables of all commands, in a file in the home of the guest's user.

Each command of the library reads the file first. In a Linux guest, the file is a shell script. In a
Windows guest, each line is a name and the value in base64 (see `agent/runner.ps1`).
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping

from smolvm_async.config.checks import check_env, shown
from smolvm_async.controls.commands.script import ENV_FILE, WINDOWS_ENV_FILE, exports, parse_exports
from smolvm_async.controls.files.files import explained
from smolvm_async.controls.files.transport import GuestFiles, OverFiles
from smolvm_async.errors import ConfigError, FileTransferError

FILE = f"the variables in ~/{ENV_FILE}"  # for messages


class Environment(OverFiles):
    """`AsyncSmolVM`'s environment variables for all later commands, kept on the guest's disk."""

    async def set_env_vars(self, env_vars: Mapping[str, str], *, merge: bool = True) -> list[str]:
        """Set environment variables for all later commands.

        The guest keeps the variables in `~/.smolvm_env.sh`, which only this user can read. Commands
        of the library get them, and no other programs of the guest. In a Windows guest, it is
        `.smolvm_env` in the profile of LocalSystem; no Windows was run.

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
        async with await self._files("set_env_vars") as guest:
            return await set_variables(guest, checked, merge=merge)

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
        async with await self._files("unset_env_vars") as guest, guest.turn:
            with explained(guest.explanation, FILE):
                known = await _read(guest)
                removed = {name: known.pop(name) for name in wanted if name in known}
                if removed:
                    await _write(guest, known)
        return removed

    async def list_env_vars(self) -> dict[str, str]:
        """Return the environment variables that `env=` and `set_env_vars()` have set.

        Raises:
            FileTransferError, ConnectionLostError, ...: See `upload_file()`.
        """
        self._require("list_env_vars")
        async with await self._files("list_env_vars") as guest:
            with explained(guest.explanation, FILE):
                return await _read(guest)


async def set_variables(
    guest: GuestFiles, env: Mapping[str, str], *, merge: bool = True
) -> list[str]:
    """Set variables; return the names of all variables that are set now, sorted."""
    async with guest.turn:
        with explained(guest.explanation, FILE):
            known = await _read(guest) if merge else {}
            await _write(guest, {**known, **env})
    return sorted({**known, **env})


async def _read(guest: GuestFiles) -> dict[str, str]:
    content = await guest.read_own(WINDOWS_ENV_FILE if guest.windows else ENV_FILE)
    try:
        text = content.decode(errors="surrogateescape")
        return _parse_lines(text) if guest.windows else parse_exports(text)
    except ValueError as error:
        raise FileTransferError(
            f"the file was changed by another program: {error}.",
            hint="Remove the file in the guest, and set the variables again.",
        ) from error


async def _write(guest: GuestFiles, env: Mapping[str, str]) -> None:
    if guest.windows:
        await guest.write_own(WINDOWS_ENV_FILE, _lines(env).encode())
    else:
        await guest.write_own(ENV_FILE, exports(env).encode(errors="surrogateescape"))


def _lines(env: Mapping[str, str]) -> str:
    encoded = {name: b64encode(value.encode(errors="replace")) for name, value in env.items()}
    return "".join(f"{name} {value.decode()}\n" for name, value in encoded.items())


def _parse_lines(text: str) -> dict[str, str]:
    pairs = [line.partition(" ") for line in text.splitlines()]
    return {name: b64decode(value, validate=True).decode() for name, _, value in pairs}
