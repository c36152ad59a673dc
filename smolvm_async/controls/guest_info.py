"""Facts about the operating system in a guest: from its agent, or from a shell program.

A hostile guest may answer anything. So texts and lists have limits, and a fact of another kind, or
one that makes no sense, counts as unknown.

No Windows was run: the agent's documentation says how Windows answers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from smolvm_async.controls.commands.query import query
from smolvm_async.errors import GuestAgentError, VMTimeoutError
from smolvm_async.foundation.tail import printable

if TYPE_CHECKING:
    from smolvm_async.controls.commands.transport import Transport
    from smolvm_async.qemu.guest_agent import GuestAgent

PATIENCE = 30.0  # seconds for the program; usually, it takes 0.1 s
LONGEST = 256  # characters of a text
MOST = 256  # items of a list
DAY = 86400  # seconds; no time zone is further from UTC

# The facts as lines of a name and a value. Debian, Busybox and most others have these programs.
PROGRAM = """
export LC_ALL=C PATH="/usr/sbin:/usr/bin:/sbin:/bin:$PATH"
(. /etc/os-release && printf 'id %s\\nname %s\\nversion %s\\n' "$ID" "$PRETTY_NAME" "$VERSION_ID")
printf 'kernel %s\\n' "$(uname -r)"
printf 'host %s\\n' "$(uname -n)"
date '+zone %Z%noffset %z'
printf 'addresses %s\\n' "$(hostname -I || ip -o addr | awk '{ print $4 }' | tr '\\n' ' ')"
command -v who >/dev/null && printf 'users %s\\n' "$(who | cut -d' ' -f1 | tr '\\n' ' ')"
df -Pk | sed -n 's|^/dev/|disk /dev/|p'
sed -n 's|^/dev/|mount /dev/|p' /proc/mounts
true
"""

# The same for Windows over SSH, as PowerShell 5.1.
WINDOWS_PROGRAM = r"""
$ErrorActionPreference = 'SilentlyContinue'
$system = Get-CimInstance Win32_OperatingSystem
$offset = [TimeZoneInfo]::Local.GetUtcOffset((Get-Date))
$sign = if ($offset -lt [TimeSpan]::Zero) { '-' } else { '+' }
'id mswindows'
"name $($system.Caption)"
"version $($system.Caption -replace '\D')"
"kernel $($system.BuildNumber)"
"host $env:COMPUTERNAME"
"zone $((Get-TimeZone).Id)"
"offset $sign$($offset.ToString('hhmm'))"
"addresses $((Get-NetIPAddress).IPAddress -join ' ')"
$user = (Get-CimInstance Win32_ComputerSystem).UserName -replace '^.*\\'
if ($user -notmatch '\s') { "users $user" }
foreach ($disk in Get-CimInstance Win32_LogicalDisk -Filter 'DriveType = 3') {
    $name, $size = $disk.DeviceID, $disk.Size
    "disk $name $([long]($size / 1KB)) $([long](($size - $disk.FreeSpace) / 1KB)) 0 0% $name/"
    "mount $name $name/ $($disk.FileSystem)"
}
"""


class GuestDisk(NamedTuple):
    """A file system on a disk of the guest.

    Attributes:
        mount_point: The directory or the drive, such as `/` or `C:/`.
        file_system: The kind, such as `ext4` or `NTFS`; `None` if unknown.
        total: The size in bytes; `None` if unknown.
        used: The bytes in use; `None` if unknown.
    """

    mount_point: str
    file_system: str | None
    total: int | None
    used: int | None


class GuestInfo(NamedTuple):
    """Facts about the operating system in a guest, as the guest tells them; `None` if unknown.

    Attributes:
        os_id: The short name, such as `debian`, or `mswindows`.
        os_name: The name for people, such as `Debian GNU/Linux 12 (bookworm)`.
        os_version: The version, such as `12`; of Windows, such as `11`.
        kernel: The version of the kernel; of Windows, the build.
        host_name: The guest's name.
        addresses: The IP addresses, without those of the loopback and link-local ones.
        time_zone: The abbreviation, such as `UTC`; of Windows, its name.
        utc_offset: Seconds that the time zone is ahead of UTC.
        users: The names of the users who are logged in.
        disks: The file systems on disks.
    """

    os_id: str | None = None
    os_name: str | None = None
    os_version: str | None = None
    kernel: str | None = None
    host_name: str | None = None
    addresses: tuple[str, ...] | None = None
    time_zone: str | None = None
    utc_offset: int | None = None
    users: tuple[str, ...] | None = None
    disks: tuple[GuestDisk, ...] | None = None


async def from_agent(agent: GuestAgent) -> GuestInfo:
    """Ask the guest's agent. An agent may lack some commands."""

    async def ask(command: str) -> Any:
        try:
            return await agent.execute(command)
        except GuestAgentError:
            return None

    system = _fields(await ask("guest-get-osinfo"))
    host = _fields(await ask("guest-get-host-name"))
    zone = _fields(await ask("guest-get-timezone"))
    interfaces = _items(await ask("guest-network-get-interfaces"))
    users = _items(await ask("guest-get-users"))
    disks = _items(await ask("guest-get-fsinfo"))
    return GuestInfo(
        _text(system.get("id")),
        _text(system.get("pretty-name")) or _text(system.get("name")),
        _text(system.get("version-id")),
        _text(system.get("kernel-release")),
        _text(host.get("host-name")),
        None if interfaces is None else _addresses(_all_addresses(interfaces)),
        _text(zone.get("zone")),
        _offset(zone.get("offset")),
        None if users is None else _names(user.get("user") for user in users),
        None if disks is None else _disks(_of_agent(disk) for disk in disks),
    )


async def from_shell(transport: Transport, *, windows: bool = False) -> GuestInfo:
    """Run a program in a guest."""
    try:
        async with transport.pauses.timeout(PATIENCE):
            answer = await query(transport, WINDOWS_PROGRAM if windows else PROGRAM, {})
    except TimeoutError:
        message = f"the guest did not tell the facts about itself within {PATIENCE:g} s"
        raise transport.explain(VMTimeoutError(message, seconds=PATIENCE)) from None
    lines: dict[str, list[str]] = {}
    for line in answer.stdout.decode(errors="replace").splitlines():
        name, _, value = line.partition(" ")
        lines.setdefault(name, []).append(value)
    one = {name: values[0] for name, values in lines.items()}
    kinds = {
        words[1]: words[2] for line in lines.get("mount", ()) if len(words := line.split()) > 2
    }
    return GuestInfo(
        _text(one.get("id")),
        _text(one.get("name")),
        _text(one.get("version")),
        _text(one.get("kernel")),
        _text(one.get("host")),
        _addresses(one["addresses"].split()) if "addresses" in one else None,
        _text(one.get("zone")),
        _offset(_seconds(one.get("offset", ""))),
        _names(one["users"].split()) if "users" in one else None,
        _disks(_of_df(line, kinds) for line in lines.get("disk", ())),
    )


def _seconds(offset: str) -> int | None:
    """Return the seconds of an offset such as `-0330`."""
    found = re.fullmatch(r"([+-])(\d\d)(\d\d)", offset, re.ASCII)
    return int(f"{found[1]}1") * (int(found[2]) * 60 + int(found[3])) * 60 if found else None


def _all_addresses(interfaces: Iterable[dict[str, Any]]) -> Iterable[object]:
    for interface in interfaces:
        for address in _items(interface.get("ip-addresses")) or ():
            yield address.get("ip-address")


def _of_agent(disk: dict[str, Any]) -> tuple[object, ...]:
    return tuple(disk.get(name) for name in ("mountpoint", "type", "total-bytes", "used-bytes"))


def _of_df(line: str, kinds: dict[str, str]) -> tuple[object, ...]:
    """Return a disk of a line of `df -Pk`: device, KiB, used, available, share, mount point."""
    words = line.split(maxsplit=5)
    if len(words) < 6 or not all(word.isascii() and word.isdigit() for word in words[1:3]):
        return (None,) * 4
    # `int()` refuses a number of thousands of digits.
    total, used = (int(word) << 10 if len(word) < 16 else None for word in words[1:3])
    return words[5], kinds.get(words[5]), total, used


def _fields(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: object) -> list[dict[str, Any]] | None:
    """Return the items of a list that have fields; `None` if there is no list."""
    if not isinstance(value, list):
        return None
    return [item for item in value[:MOST] if isinstance(item, dict)]


def _text(value: object) -> str | None:
    if not isinstance(value, str) or len(value) > LONGEST:
        return None
    return printable(value).strip() or None


def _offset(value: object) -> int | None:
    return value if type(value) is int and abs(value) <= DAY else None


def _size(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _names(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(sorted({name for value in values if (name := _text(value))})[:MOST])


def _addresses(values: Iterable[object]) -> tuple[str, ...]:
    found: list[str] = []
    for value in values:
        try:
            address = ipaddress.ip_interface(_text(value) or "").ip
        except ValueError:
            continue
        if not address.is_loopback and not address.is_link_local and str(address) not in found:
            found.append(str(address))
    return tuple(found[:MOST])


def _disks(values: Iterable[tuple[object, ...]]) -> tuple[GuestDisk, ...]:
    found = []
    for mount_point, kind, total, used in values:
        if where := _text(mount_point):
            found.append(GuestDisk(where, _text(kind), _size(total), _size(used)))
    return tuple(found[:MOST])
