"""Snapshots, forks and restores of real guests: each part of a machine is of one moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from smolvm_async import (
    AsyncSmolVM,
    ImageError,
    LaunchError,
    NetworkDenied,
    Rung,
    SnapshotError,
    SnapshotNotFoundError,
    Status,
    VMNotRunningError,
)
from smolvm_async.vm import snapshot
from stand_in import build_stand_in
from tests.conftest import BOOT, console_shows, run_of, vm_in

pytestmark = pytest.mark.anyio


async def said(vm: AsyncSmolVM, command: str) -> str:
    return (await vm.run(command, check=True)).stdout.strip()


async def test_a_linux_guest_goes_on_in_clones_of_clones_and_boots_from_a_snapshot_at_rest(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "MOST", 3)  # flatten again and again
    async with AsyncSmolVM(data_dir=data_dir, accel="tcg") as vm:
        count = "i=0; while sleep 0.2; do i=$((i+1)); echo $i >/run/count; done"
        await said(vm, f"({count}) </dev/null >/dev/null 2>&1 & echo A >/root/state")
        await said(vm, "head -c 4M /dev/urandom >/root/big; sha256sum /root/big >/root/sum; sync")
        command = asyncio.create_task(
            said(vm, "until [ -e /run/over ]; do sleep 0.1; done; echo done")
        )
        for name in ("running", "another"):
            await vm.snapshot(name, labels={"for": "a test"})
            await said(vm, f"echo {name} >>/root/log")
        await said(vm, "touch /run/over; echo B >/root/state")
        assert await command == "done"

        await vm.pause()
        for name in ("paused", "paused-again"):
            await vm.snapshot(name)
            assert vm.status is Status.PAUSED
        await vm.resume()
        before = int(await said(vm, "cat /run/count"))
        found = await AsyncSmolVM.snapshots(data_dir=data_dir)
        assert [one.name for one in found] == ["running", "another", "paused", "paused-again"]

        look = "cat /root/state; sha256sum -c /root/sum >/dev/null && hostname"
        async with AsyncSmolVM.from_snapshot("paused-again", data_dir=data_dir) as clone:
            await AsyncSmolVM.delete_snapshot("paused-again", data_dir=data_dir)
            assert await said(clone, look) == f"B\n{clone.vm_id}"
            await said(clone, "echo C >/root/state")
            async with clone.fork(1) as (child,), child.fork(1) as (grandchild,):
                for each in (child, grandchild):
                    assert await said(each, look) == f"C\n{each.vm_id}"
                assert int(await said(grandchild, "cat /run/count")) >= before - 5
        assert await said(vm, look) == f"B\n{vm.vm_id}"

        restarted = await AsyncSmolVM.from_snapshot("running", data_dir=data_dir)
        await said(restarted, "echo D >/root/state")
        await restarted.stop(timeout=0)
        await restarted.start()  # from the snapshot again
        assert await said(restarted, "cat /root/state; cat /root/log || true") == "A"
        await restarted.delete()

        kept = await AsyncSmolVM.from_snapshot("another", data_dir=data_dir, keep=True)
        await said(kept, "echo E >/root/state")
        await kept.stop()
        assert not (await kept.snapshot("rest")).live
        await kept.start()
        assert await said(kept, f"{look}; cat /root/log") == f"E\n{kept.vm_id}\nrunning"
        await kept.delete()
    async with AsyncSmolVM.from_snapshot("rest", data_dir=data_dir, accel="tcg") as booted:
        assert await said(booted, look) == f"E\n{booted.vm_id}"
    for name in ("running", "another", "paused", "rest"):
        await AsyncSmolVM.delete_snapshot(name, data_dir=data_dir)


BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


async def test_the_first_random_numbers_names_and_keys_of_clones_differ(data_dir: Path) -> None:
    look = (
        "head -c 16 /dev/urandom | md5sum; cat /proc/sys/kernel/random/uuid; hostname; "
        f"md5sum </run/smolvm/host_key; {BOOT_ID}; cat /sys/class/net/e*/address"
    )
    async with AsyncSmolVM(data_dir=data_dir, accel="tcg") as vm, vm.fork(16) as clones:
        answers = await asyncio.gather(*(said(each, look) for each in (vm, *clones)))
        for clone in clones:
            await clone.delete()
        async with vm.fork(1) as (late,):  # by now, the original has drawn its boot id
            assert await said(late, BOOT_ID) == await said(vm, BOOT_ID)
    drawn = zip(*(answer.splitlines() for answer in answers), strict=True)
    assert [len(set(values)) for values in drawn] == [17] * 5 + [1]


HELD = "fcntl.ioctl(open('/dev/input/event0', 'rb'), 0x80604518, bytes(96))"  # EVIOCGKEY


SERVER = """
import socket, time
server = socket.create_server(("", 8000))
print("up", flush=True)
connection, _ = server.accept()
try:
    while not time.sleep(0.1):
        connection.sendall(b"tick\\n")
except OSError as error:
    open("/run/lost", "w").write(error.strerror)
"""


async def test_commands_connections_and_a_held_key_go_on_and_in_the_clone_only_the_key_does(
    data_dir: Path,
) -> None:
    holds = f'python3 -c "import fcntl; print(any({HELD}))"'
    tick = "while sleep 0.1; do echo tick; done"
    serve = f"exec python3 -Sc {shlex.quote(SERVER)}"
    async with (
        AsyncSmolVM(data_dir=data_dir, accel="tcg") as vm,
        await vm.spawn(serve) as server,
        await vm.spawn("exec cat") as echo,
        vm.run_stream(tick) as lines,
    ):
        assert await server.stdout.readline() == b"up\n"
        port = await vm.expose_local(8000)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(anext(lines), reader.readline())
        await vm.keyboard.down("shift")
        async with vm.fork(1) as (clone,):
            for _ in range(20):  # the library has read some of them before the fork
                await asyncio.gather(anext(lines), reader.readline())
            gone = "while pgrep -x cat || pgrep -f 'echo ti[c]k'; do sleep 0.1; done >/dev/null"
            await clone.run(gone, check=True, timeout=BOOT)
            lost = "until [ -s /run/lost ]; do sleep 0.1; done; cat /run/lost"
            assert await said(clone, lost) == "Connection reset by peer"
            assert await said(clone, holds) == "True"
            await clone.keyboard.up("shift")
            assert await said(clone, holds) == "False"
        assert await said(vm, holds) == "True"
        await vm.keyboard.up("shift")
        assert await said(vm, holds) == "False"
        await echo.write("on\n")
        assert await echo.stdout.readline() == b"on\n"
        await asyncio.gather(anext(lines), reader.readline())
        assert (await vm.run("cat /run/lost")).exit_code == 1
        writer.close()


async def test_what_is_damaged_or_missing_is_refused_before_anything_is_made(
    blank: dict[str, Any], tmp_path: Path
) -> None:
    data_dir, image = blank["data_dir"], tmp_path / "image.qcow2"
    shutil.copy(blank["image"], image)
    async with AsyncSmolVM(**{**blank, "image": image}) as vm:
        await vm.snapshot("one")
    files = data_dir / ".snapshots" / "one"
    whole = files.parent / "whole"

    async def refused(error: type[Exception], reason: str, name: str = "one") -> None:
        with pytest.raises(error, match=reason):
            await AsyncSmolVM.from_snapshot(name, data_dir=data_dir)
        assert [path.name for path in data_dir.iterdir()] == [".snapshots"]

    await refused(SnapshotNotFoundError, "none", "none")
    for name in ("ram", "machine", "overlay.qcow2", "snapshot.json"):
        shutil.copytree(files, whole)
        with (files / name).open("r+b") as file:
            file.truncate(100)
        await refused(SnapshotError, name if name != "snapshot.json" else "record")
        (files / name).unlink()
        await refused(SnapshotError, f"{name}' is missing")
        shutil.rmtree(files)
        whole.rename(files)
    layer = files / "overlay.qcow2"
    times = layer.stat().st_atime_ns, layer.stat().st_mtime_ns

    def rewrite(head: bytes) -> None:
        with layer.open("r+b") as file:
            file.write(head)
        os.utime(layer, ns=times)

    rewrite(bytes(4))
    await refused(SnapshotError, "'overlay.qcow2' is not a layer")
    rewrite(b"QFI\xfb")
    record = files / "snapshot.json"
    values = json.loads(record.read_bytes())
    values["config"]["cpus"] = 2
    record.write_text(json.dumps(values))
    await refused(LaunchError, "take the snapshot again")
    os.utime(image)
    await refused(ImageError, "was changed")
    image.unlink()
    await refused(ImageError, "image")
    await AsyncSmolVM.delete_snapshot("one", data_dir=data_dir)
    with pytest.raises(VMNotRunningError):
        await vm.snapshot("one")


# The Windows class: a test types commands on the serial console of the stand-in.

AUTHORIZATION = "00000009400000090000000000"  # an empty password
NV_INDEX = "01500011"
GUID = "6e3d3f7c-2f0b-4f7c-9d5e-6b0c6a5d8f10"


class Typist:
    """Runs shell commands in a stand-in with `stand_in.shell=on`."""

    def __init__(self, vm: AsyncSmolVM) -> None:
        self.vm = vm
        self._count = 0

    async def ask(self, command: str) -> str:
        """Return the output of a command."""
        self._count += 1
        name = f"{self.vm.vm_id}-{self._count}"
        os.write(run_of(self.vm).console._reader._fd, f'say "{name}=$({command})."\n'.encode())
        await console_shows(self.vm, f"STAND-IN: {name}=")
        pattern = rf"STAND-IN: {name}=(.*?)\.\r?\n"
        async with asyncio.timeout(BOOT):
            while (found := re.search(pattern, self.vm.console_log(), re.DOTALL)) is None:
                await asyncio.sleep(0.02)
        return found[1]

    async def tpm(self, tag: str, command: str, body: str) -> str:
        """Execute a command of the TPM, and return the answer after its head of ten bytes."""
        whole = bytes.fromhex(f"{tag}{10 + len(body) // 2:08x}{command}{body}")
        octal = "".join(f"\\{byte:03o}" for byte in whole)
        answer = await self.ask(
            f"exec 3<>/dev/tpmrm0; printf '{octal}' >&3; dd bs=256 count=1 <&3 2>/dev/null | "
            "hexdump -v -e '1/1 \"%02x\"'"
        )
        assert answer[12:20] == "00000000", answer
        return answer[20:]

    async def define(self) -> None:
        """Define an index of eight bytes in the TPM's memory."""
        public = f"000e{NV_INDEX}000b0206000600000008"
        await self.tpm("8002", "0000012a", f"40000001{AUTHORIZATION}0000{public}")

    async def change(self, mark: str) -> None:
        """Change the disk, a UEFI variable, a PCR, and an index of the TPM's memory."""
        variable = f"/sys/firmware/efi/efivars/Mark{mark}-{GUID}"
        await self.ask(f"echo {mark} >/state; printf '\\007\\000\\000\\000\\001' >{variable}")
        digest = mark.encode().hex() * 32
        await self.tpm("8002", "00000182", f"00000010{AUTHORIZATION}00000001000b{digest}")
        data = mark.encode().hex() * 8
        await self.tpm("8002", "00000137", f"{NV_INDEX}{NV_INDEX}{AUTHORIZATION}0008{data}0000")

    async def state(self) -> tuple[str, ...]:
        """Return what `change()` changes, and whether Secure Boot is on."""
        marks = "ls /sys/firmware/efi/efivars | grep ^Mark | cut -c 5"
        look = f"cat /state; {marks}; efi_variable SecureBoot"
        pcr = await self.tpm("8001", "0000017e", "00000001000b03000001")
        index = await self.tpm("8002", "0000014e", f"{NV_INDEX}{NV_INDEX}{AUTHORIZATION}00080000")
        return (*(await self.ask(look)).split(), pcr[-64:], bytes.fromhex(index[12:28]).decode())

    async def reached(self, *ports: int) -> list[int]:
        """Return the ports of the host's loopback that the guest reaches, each at once."""
        tries = "; ".join(
            f"nc 10.0.2.2 {port} </dev/null >/dev/null 2>&1 && echo {port}" for port in ports
        )
        return [int(port) for port in (await self.ask(tries)).split()]


async def test_a_windows_guest_has_each_part_of_its_state_in_each_clone(data_dir: Path) -> None:
    image = await build_stand_in(kernel_arguments=["stand_in.shell=on"], desktop=True)
    before = image.stat().st_mtime_ns, image.read_bytes()
    async with contextlib.AsyncExitStack() as servers:
        ports = [await a_server(servers) for _ in range(2)]
        await try_the_state(image, data_dir, *ports)
    await AsyncSmolVM.delete_snapshot("one", data_dir=data_dir)
    assert (image.stat().st_mtime_ns, image.read_bytes()) == before


async def a_server(stack: contextlib.AsyncExitStack) -> int:
    """Return the port of a new server that ends all connections."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    stack.push_async_callback(server.wait_closed)
    stack.callback(server.close)
    return int(server.sockets[0].getsockname()[1])


async def try_the_state(image: Path, data_dir: Path, port: int, other: int) -> None:
    async with vm_in(data_dir, image, internet_settings={"allowed_host_ports": [port]}) as vm:
        await vm.wait_for("ready", timeout=BOOT)
        await console_shows(vm, "STAND-IN: ready")
        await console_shows(vm, "STAND-IN: address=")
        original = Typist(vm)
        events = vm.events()
        assert await original.reached(port, other) == [port]
        denied = [
            (each.address, each.port)
            for each in events.pending()
            if isinstance(each, NetworkDenied)
        ]
        assert denied == [("10.0.2.2", other)]
        await original.define()
        await original.change("A")
        first = await original.state()
        assert (first[0], first[1], first[2], first[-1]) == ("A", "A", "1", "AAAAAAAA")
        await vm.keyboard.type("abc")
        picture = (await vm.wait_for_screen(stable=1, timeout=BOOT)).pixels
        await vm.snapshot("one")
        await original.change("B")
        second = await original.state()
        assert second[:4] == ("B", "A", "B", "1")

        await vm.set_internet_settings({"mode": "off"})
        policies = None, {"allowed_host_ports": [other]}
        clones = [
            await AsyncSmolVM.from_snapshot("one", data_dir=data_dir, internet_settings=policy)
            for policy in policies
        ]
        typists = [Typist(clone) for clone in clones]
        reached = [await typist.reached(port, other) for typist in (original, *typists)]
        assert reached == [[], [port], [other]]
        for typist, mark in zip(typists, "CD", strict=True):
            assert (await typist.vm.screenshot()).pixels == picture
            assert await typist.state() == first
            assert await run_of(typist.vm).peripherals.agent.execute("guest-ping") == {}
            await typist.change(mark)
        for typist, mark in zip(typists, "CD", strict=True):
            mine = await typist.state()
            assert (*mine[:4], mine[-1]) == (mark, "A", mark, "1", mark * 8)
        assert await original.state() == second
        clock = int(await typists[0].ask("date +%s"))
        assert abs(clock - int(await original.ask("date +%s"))) < BOOT
        async with clones[0].fork(1) as (child,):
            assert await Typist(child).state() == await typists[0].state()
            assert (await child.stop()).rung is Rung.POWERDOWN
        assert (await clones[1].stop()).rung is Rung.POWERDOWN
        for clone in clones:
            await clone.delete()
        assert await original.state() == second
