"""The network policy: a guest tries everything, between a host and an internet of the test's own.

Three programs play: see `tests/internet/`. The guest is the built-in Debian, or the stand-in.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import AsyncSmolVM, Fleet, InternetSettings, VMCrashedError
from smolvm_async.config.options import VMOptions
from smolvm_async.host import seccomp
from tests.conftest import children
from tests.internet import near

MODES = ("open", "clone", "restricted", "off")

# Where a server answers, and in which modes. All other targets of the guest are shut.
ANSWERED = {
    ("tcp", "203.0.113.1", 80): {"open", "clone"},
    ("tcp", "198.51.100.1", 80): {"open", "clone", "restricted"},
    ("tcp", "2001:db8::1", 80): {"open", "clone"},
    ("udp", "203.0.113.1", 9000): {"open", "clone"},
    ("udp", "2001:db8::1", 9000): {"open", "clone"},
    ("udp", "198.51.100.1", 9000): {"open", "clone", "restricted"},
    ("tcp", "10.0.2.2", 8000): {"open", "clone"},
    ("udp", "10.0.2.2", 8000): {"open", "clone"},
    ("tcp", "fec0::2", 8000): {"open", "clone"},
    ("icmp", "203.0.113.1", 0): {"open", "clone"},
}
# The host connects to allowed names for the guest, and asks its DNS server for them.
NAMED = ("one.example", "deep.two.example")
BY_NAME = {
    ("tcp", "203.0.113.1", 80),
    ("udp", "203.0.113.1", 9000),
    ("icmp", "203.0.113.1", 0),
    ("tcp", "198.51.100.2", 80),
    ("udp", "203.0.113.53", 53),
}
OF_THE_HOST = {("127.0.0.1", 8000), ("::1", 8000)}  # what 10.0.2.2 and fec0::2 are


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Let the guest try everything under each policy, once for all tests."""
    result: Mapping[str, Any] = try_in_namespaces(tmp_path_factory.mktemp("internet"))
    return result


def try_in_namespaces(*arguments: Path) -> Any:
    """Run `tests/internet/near.py` in namespaces of its own, and return its results."""
    new_namespaces = ["unshare", "--net", "--mount"]
    if subprocess.run([*new_namespaces, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot make network namespaces")
    argv = [*new_namespaces, sys.executable, "-m", "tests.internet.near", *map(str, arguments)]
    host = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert host.returncode == 0, host.stderr
    return json.loads(host.stdout)


@pytest.mark.parametrize("mode", MODES)
def test_a_guest_reaches_what_its_policy_allows_and_nothing_else(
    results: Mapping[str, Any], mode: str
) -> None:
    allowed = {target for target, modes in ANSWERED.items() if mode in modes}
    for protocol, address, port in near.TARGETS:
        result = results[mode]["ways"][f"{protocol} {address} {port}"]
        answered = (protocol, address, port) in allowed
        assert (result == "ok") == answered, (protocol, address, port, result)
    seen = {tuple(target) for target in results[mode]["seen"]}
    internet = {target for target in allowed if target[1] not in ("10.0.2.2", "fec0::2")}
    assert internet <= seen
    if mode in ("restricted", "off"):
        assert seen == internet | (BY_NAME if mode == "restricted" else set())
    heard = {tuple(contact) for contact in results[mode]["heard"]}
    assert heard == (OF_THE_HOST if mode in ("open", "clone") else set())


def test_a_restricted_guest_reaches_allowed_names_and_no_others(results: Mapping[str, Any]) -> None:
    restricted = results["restricted"]
    for query, answer in restricted["names"].items():
        if query.split()[0] in NAMED:
            assert ip_address(answer) in ip_network("198.18.0.0/15"), query
        else:
            assert answer == "code 3", query
    reached = {name for name, result in restricted["fetched"].items() if result == "ok"}
    assert reached == set(NAMED)
    assert restricted["sent"] == ["ok", "ok", "no such name"]  # datagrams, and a ping


@pytest.mark.parametrize("mode", MODES)
def test_a_refused_connection_is_reset_at_once(results: Mapping[str, Any], mode: str) -> None:
    refused = [
        result
        for way, result in results[mode]["ways"].items()
        if way.startswith("tcp") and result != "ok"
    ]
    assert refused
    assert set(refused) == {"ECONNREFUSED"}


def test_each_refusal_is_an_event_or_is_counted_by_one(results: Mapping[str, Any]) -> None:
    opened = results["open"]
    denied = {tuple(refusal) for refusal in opened["denied"]}
    expected = {
        ("tcp", "169.254.169.254", 80),
        ("udp", "169.254.169.254", 9000),
        ("tcp", "100.100.100.200", 80),
        ("tcp", "192.0.2.1", 8000),
        ("udp", "192.0.2.1", 8000),
        ("tcp", "192.0.2.1", 8002),  # the frame to the gateway has arrived there
        ("tcp", "2001:db8:f::1", 8000),
    }
    assert len(expected - denied) <= opened["omitted"]
    assert results["off"]["omitted"] > 0  # a bounded rate


def test_a_change_of_the_policy_ends_the_connections_that_it_shuts(
    results: Mapping[str, Any],
) -> None:
    assert results["held"] == "ended"


def test_a_guest_connects_while_the_event_loop_is_blocked(results: Mapping[str, Any]) -> None:
    assert results["beat"] < near.BLOCKED / 2


@pytest.mark.anyio
async def test_a_windows_guest_has_the_same_policy(stand_in: Path, data_dir: Path) -> None:
    result = await asyncio.to_thread(try_in_namespaces, data_dir, stand_in)
    assert result["said"] == [
        "203.0.113.1 80 refused",
        "198.51.100.1 80 hello",
        "192.0.2.1 8000 refused",
        "169.254.169.254 80 refused",
        "10.0.2.2 8000 hello",
        "10.0.2.2 8001 refused",
        "10.0.2.3 22 refused",
        "one.example hello",
        "secret.example ",
        "loopback.example ",
    ]
    seen = {tuple(target) for target in result["seen"]}
    assert seen == {
        ("tcp", "198.51.100.1", 80),
        ("tcp", "203.0.113.1", 80),
        ("udp", "203.0.113.53", 53),
    }
    assert result["heard"] == [["127.0.0.1", 8000]]


async def reached(vm: AsyncSmolVM, *ports: int) -> list[int]:
    """Return the ports of the host's loopback that the guest reaches."""
    tries = "; ".join(f"(</dev/tcp/10.0.2.2/{port}) 2>/dev/null && echo {port}" for port in ports)
    return [int(port) for port in (await vm.run(f"bash -c '{tries}; true'")).stdout.split()]


async def cli(*words: object) -> asyncio.subprocess.Process:
    argv = [sys.executable, "-m", "smolvm_async", *map(str, words)]
    return await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)


@pytest.mark.anyio
async def test_the_policy_goes_with_a_kept_vm_to_other_processes_clones_and_later_starts(
    data_dir: Path,
) -> None:
    servers = [
        await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        for _ in range(2)
    ]
    one, two = ports = [server.sockets[0].getsockname()[1] for server in servers]
    only_one = InternetSettings(mode="restricted", allowed_host_ports=(one,))
    settings: dict[str, Any] = {"accel": "tcg", "vm_id": "kept", "keep": True}
    async with AsyncSmolVM(data_dir=data_dir, internet_settings=only_one, **settings) as vm:
        assert await reached(vm, *ports) == [one]
        await vm.snapshot("one")

        place = ("--data-dir", data_dir, "--json")
        watching = await cli("events", "kept", "--follow", *place)
        change = await cli("network", "kept", "--internet", "off", *place)
        assert json.loads((await change.communicate())[0])["mode"] == "off"
        assert vm.internet_settings.mode == "off"
        assert await reached(vm, *ports) == []
        assert watching.stdout is not None
        reading = asyncio.ensure_future(watching.stdout.readuntil(b'"NETWORK_DENIED"'))
        while not reading.done():  # it may not watch yet
            assert await reached(vm, one) == []
        event = json.loads(b"{" + (await watching.stdout.readline()).lstrip(b", "))
        assert (event["data"]["address"], event["data"]["port"]) == ("10.0.2.2", one)

        template: VMOptions = {"data_dir": data_dir}
        said: VMOptions = {
            **template,
            "internet_settings": {"mode": "restricted", "allowed_host_ports": [two]},
        }
        for options, expected in (template, [one]), (said, [two]):
            async with Fleet(options, size=1, from_snapshot="one") as fleet:
                async for clone in fleet:
                    assert await reached(clone, *ports) == expected
        await vm.stop()
        await watching.communicate()
        assert watching.returncode == 0
    change = await cli("network", "kept", "--allow-host-port", two, *place)
    assert json.loads((await change.communicate())[0])["allowed_host_ports"] == [two]
    async with await AsyncSmolVM.from_id("kept", data_dir=data_dir) as vm:
        assert await reached(vm, *ports) == [two]
    await AsyncSmolVM.delete_snapshot("one", data_dir=data_dir)
    await vm.delete()
    for server in servers:
        server.close()


@pytest.mark.anyio
async def test_a_failed_guard_shuts_the_network_and_lets_the_guest_go_on(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a flood of refused packets. Neither the failure nor QEMU's end leaves anything."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    only_one: dict[str, object] = {"allowed_host_ports": [port]}
    vm = AsyncSmolVM(accel="tcg", data_dir=data_dir, internet_settings=only_one)

    async def crash() -> None:
        flood = f"while :; do (</dev/udp/10.0.2.2/9; </dev/tcp/10.0.2.2/{port + 1}); done"
        flooding = asyncio.ensure_future(vm.run(f"bash -c '{flood}' 2>/dev/null"))
        changes: list[dict[str, object]] = [{"mode": "off"}, {"mode": "restricted"}, only_one]
        await asyncio.gather(*map(vm.set_internet_settings, changes))
        assert await reached(vm, port) == [port]

        def fail(*_: object) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(seccomp, "answer", fail)
            assert await reached(vm, port) == []
        assert await reached(vm, port) == []
        assert (await vm.run("echo alive")).stdout == "alive\n"
        (qemu,) = children()
        os.kill(qemu, signal.SIGKILL)
        await flooding

    with pytest.raises(VMCrashedError, match="SIGKILL"):
        async with vm:
            await crash()
    server.close()
