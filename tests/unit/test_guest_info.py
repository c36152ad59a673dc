"""Facts about a guest, as agents and shell programs tell them, hostile ones too."""

from __future__ import annotations

import subprocess
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from smolvm_async.controls.commands.transport import Transport
from smolvm_async.controls.guest_info import PROGRAM, GuestDisk, GuestInfo, from_agent, from_shell
from smolvm_async.errors import ConnectionLostError, GuestAgentError
from smolvm_async.qemu.guest_agent import GuestAgent
from smolvm_async.qemu.pauses import Pauses

pytestmark = pytest.mark.anyio

WINDOWS = {  # as QEMU's documentation and source describe it
    "guest-get-osinfo": {
        "id": "mswindows",
        "name": "Microsoft Windows",
        "pretty-name": "Windows 11 Pro",
        "version": "Microsoft Windows 11",
        "version-id": "11",
        "kernel-release": "22631",
    },
    "guest-get-host-name": {"host-name": "DESKTOP-1"},
    "guest-get-timezone": {"zone": "W. Europe Standard Time", "offset": 3600},
    "guest-network-get-interfaces": [
        {"name": "Loopback", "ip-addresses": [{"ip-address": "127.0.0.1"}, {"ip-address": "::1"}]},
        {
            "name": "Ethernet",
            "ip-addresses": [
                {"ip-address": "fe80::1%5", "ip-address-type": "ipv6", "prefix": 64},
                {"ip-address": "10.0.2.15", "ip-address-type": "ipv4", "prefix": 24},
                {"ip-address": "no address"},
            ],
        },
    ],
    "guest-get-users": [
        {"user": "Me", "domain": "DESKTOP-1", "login-time": 1.5},
        {"user": "Me", "domain": "DESKTOP-1", "login-time": 2.5},
    ],
    "guest-get-fsinfo": [
        {"mountpoint": "C:\\", "type": "NTFS", "total-bytes": 1 << 36, "used-bytes": 1 << 35},
        {"mountpoint": "System Reserved", "type": "NTFS"},
    ],
}
NONSENSE: list[Any] = [None, {}, [], "", 1, -1, True, "x" * 300, [1, None], {"host-name": ["a"]}]
FLOOD: dict[str, Any] = {
    "guest-get-osinfo": {"id": "x" * 257, "version-id": "\x1b[31m12", "name": "\x00"},
    "guest-get-timezone": {"zone": 1, "offset": 1 << 40},
    "guest-get-users": [{"user": f"user{number}"} for number in range(5000)],
    "guest-get-fsinfo": [{"mountpoint": "/", "total-bytes": -1, "used-bytes": True}] * 5000,
    "guest-network-get-interfaces": [
        {"ip-addresses": [{"ip-address": f"10.0.{number}.1"} for number in range(255)]}
    ]
    * 20,
}


class Agent:
    """An agent with given results; it lacks all other commands."""

    def __init__(self, results: dict[str, Any]) -> None:
        self._results = results

    async def execute(self, command: str) -> Any:
        if command not in self._results:
            raise GuestAgentError("no such command", command=command)
        result = self._results[command]
        if isinstance(result, Exception):
            raise result
        return result


async def told(results: dict[str, Any]) -> GuestInfo:
    return await from_agent(cast(GuestAgent, Agent(results)))


async def test_the_facts_of_a_windows_agent() -> None:
    assert await told(WINDOWS) == GuestInfo(
        "mswindows",
        "Windows 11 Pro",
        "11",
        "22631",
        "DESKTOP-1",
        ("10.0.2.15",),
        "W. Europe Standard Time",
        3600,
        ("Me",),
        (
            GuestDisk("C:\\", "NTFS", 1 << 36, 1 << 35),
            GuestDisk("System Reserved", "NTFS", None, None),
        ),
    )


async def test_an_agent_may_lack_commands_but_its_end_is_an_error() -> None:
    assert await told({}) == GuestInfo()
    with pytest.raises(ConnectionLostError):
        await told({"guest-get-users": ConnectionLostError("the guest agent ended")})


@pytest.mark.parametrize("value", NONSENSE)
async def test_facts_that_make_no_sense_are_unknown(value: Any) -> None:
    info = await told(dict.fromkeys(WINDOWS, value))
    assert [fact for fact in info if fact] == []


async def test_a_flood_of_facts_is_cut() -> None:
    info = await told(FLOOD)
    assert (info.os_id, info.os_version, info.os_name, info.utc_offset) == (None, "12", None, None)
    assert info.users is not None
    assert info.addresses is not None
    assert len(info.users) == len(info.addresses) + 1 == 256
    assert info.disks == (GuestDisk("/", None, None, None),) * 256


class Shell:
    """A transport that answers all programs with the same output."""

    pauses = Pauses()

    def __init__(self, output: bytes) -> None:
        self._output = output

    @asynccontextmanager
    async def executing(self, command: Any, receive: Any, on_turn: Any) -> Any:
        receive("stdout", self._output)
        yield Ended()


class Ended:
    exit_code = 0

    def __init__(self) -> None:
        import asyncio

        self.ended = asyncio.get_running_loop().create_future()
        self.ended.set_result(None)

    async def write(self) -> None:
        pass


async def said(output: str) -> GuestInfo:
    return await from_shell(cast(Transport, Shell(output.encode())))


async def test_the_program_for_linux_tells_the_facts_of_this_host() -> None:
    ran = subprocess.run(["sh", "-c", PROGRAM], capture_output=True, text=True, check=True)
    info = await said(ran.stdout)
    assert info.kernel == subprocess.check_output(["uname", "-r"], text=True).strip()
    assert info.host_name == subprocess.check_output(["uname", "-n"], text=True).strip()
    assert None not in (info.os_id, info.os_name, info.time_zone, info.utc_offset, info.addresses)


async def test_the_lines_of_the_program_for_windows_are_facts() -> None:
    info = await said(
        "id mswindows\r\nname Microsoft Windows 11 Pro\r\nversion 11\r\nkernel 22631\r\n"
        "host DESKTOP-1\r\nzone W. Europe Standard Time\r\noffset +0100\r\n"
        "addresses fe80::1%5 ::1 10.0.2.15 127.0.0.1\r\nusers me\r\n"
        "disk C: 4 2 0 0% C:/\r\nmount C: C:/ NTFS\r\n"
    )
    assert info == GuestInfo(
        *("mswindows", "Microsoft Windows 11 Pro", "11", "22631", "DESKTOP-1", ("10.0.2.15",)),
        *("W. Europe Standard Time", 3600, ("me",), (GuestDisk("C:/", "NTFS", 4096, 2048),)),
    )


async def test_lines_that_make_no_sense_are_unknown() -> None:
    assert await said("") == GuestInfo(disks=())
    info = await said(
        "offset +99999\nusers \nhost \naddresses 1 2 x fe80::1 10.0.0.1\nkernel\n\n \n"
        "disk /dev/vda 1\ndisk /dev/vda1 5 x 1 1% /\ndisk /dev/vda2 4 2 2 50% /a b\n"
        f"disk /dev/vda3 {'9' * 5000} 1 1 1% /c\nmount /dev/vda3 /c ext4\nmount x\n"
    )
    assert (info.utc_offset, info.users, info.host_name, info.kernel) == (None, (), None, None)
    assert info.addresses == ("10.0.0.1",)
    assert info.disks == (
        GuestDisk("/a b", None, 4096, 2048),
        GuestDisk("/c", "ext4", None, 1024),
    )
