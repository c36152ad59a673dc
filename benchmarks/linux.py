"""From `async with AsyncSmolVM()` to the first command's answer, against a bare QEMU.

The bare QEMU boots the same kernel, initramfs and disk with a command line tuned by hand, and gets
a command over SSH as soon as it answers. It takes turns with the library's boot (`boot="cold"`),
and this boot is the floor of the library's warm start, the default. The variants of the machine
show the gain of each choice; only the ratios mean much.

    python benchmarks/linux.py [-n 5] [--variants] [--commands 30] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import asyncssh

from benchmarks.figures import Figure, Results, show
from smolvm_async import AcceleratorWarning, AsyncSmolVM
from smolvm_async.controls.ssh.login import make_key_pair
from smolvm_async.images.build.debian import DebianImage, build_debian
from smolvm_async.images.build.debian.builder import BOOT_ARGS

MACHINE = "q35,i8042=off,smbus=off,sata=off,hpet=off,vmport=off"
ATTEMPT = 0.3  # seconds for a server's greeting
BOOT = 120.0  # seconds
WARM = 0.22  # the budget of a warm start: the part of a boot's time

# The changes to the bare command line: the old text and the new text.
VARIANTS: Mapping[str, tuple[str, str]] = {
    "with a PS/2 keyboard (i8042)": ("i8042=off,", ""),
    "-cpu max": ("qemu64,+rdrand", "max"),
    "machine pc": (MACHINE, "pc,hpet=off,vmport=off"),
    "all of the machine's own devices": (MACHINE, "q35"),
    "two processors": ("cpus=1", "cpus=2"),
    "the kernel's own defaults": (f" {BOOT_ARGS.partition('rw ')[2]}", ""),
    "a compressed initramfs": ("initramfs", "initramfs.gz"),
}


def bare_arguments(image: DebianImage, directory: Path, port: int) -> list[str]:
    """Return QEMU's command line, tuned by hand."""
    drive = f"file={directory / 'overlay.qcow2'},format=qcow2,if=none,id=disk,cache=unsafe"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", MACHINE, "-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand"),
        *("-smp", "cpus=1", "-m", "512"),
        *(
            "-kernel",
            str(image.kernel),
            "-initrd",
            str(directory / "initramfs"),
            "-append",
            image.boot_args,
        ),
        *("-drive", drive, "-device", "virtio-blk-pci,drive=disk"),
        *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
        *("-device", "virtio-rng-pci", "-serial", f"file:{directory / 'console'}"),
        *("-fw_cfg", f"name=opt/smolvm/authorized_keys,file={directory / 'authorized_keys'}"),
        *("-fw_cfg", f"name=opt/smolvm/ssh_host_ed25519_key,file={directory / 'host_key'}"),
        *("-fw_cfg", "name=opt/smolvm/hostname,string=bare"),
    ]


async def bare(image: DebianImage, change: Callable[[str], str] = str) -> float:
    """Return the seconds from spawning QEMU until a command has been answered."""
    key, host_key = make_key_pair(), make_key_pair()
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        directory = Path(name)
        (directory / "authorized_keys").write_text(f"{key.public}\n")
        (directory / "host_key").write_bytes(host_key.private)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        (directory / "initramfs").symlink_to(image.initrd)
        (directory / "initramfs.gz").write_bytes(gzip.compress(image.initrd.read_bytes(), 6))
        argv = [change(word) for word in bare_arguments(image, directory, port)]
        began = time.perf_counter()
        overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"]
        subprocess.run(  # noqa: ASYNC221 (nothing else runs)
            [*overlay, "-b", image.disk, directory / "overlay.qcow2"], check=True
        )
        with subprocess.Popen(argv, start_new_session=True) as qemu:  # noqa: ASYNC220
            try:
                async with asyncio.timeout(BOOT):
                    await _answer(port, key.private, host_key.public)
                return time.perf_counter() - began
            finally:
                qemu.kill()


async def _answer(port: int, key: bytes, host_key: str) -> None:
    known: Any = ([asyncssh.import_public_key(host_key)], [], [])
    while True:
        if await _greets(port):
            with contextlib.suppress(OSError, asyncssh.Error):
                async with asyncssh.connect(
                    "127.0.0.1",
                    port,
                    username="root",
                    client_keys=[asyncssh.import_private_key(key)],
                    known_hosts=known,
                    config=None,
                    agent_path=None,
                ) as connection:
                    await connection.run("uname -a", check=True)
                    return
        await asyncio.sleep(0.02)


async def _greets(port: int) -> bool:
    """Return whether a server sends something: QEMU accepts before the guest listens."""
    try:
        async with asyncio.timeout(ATTEMPT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return bool(await reader.read(1))
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


async def ours(boot: Literal["cold", "warm"]) -> float:
    """Return the seconds from `async with` to the first answer."""
    began = time.perf_counter()
    vm = AsyncSmolVM(accel="tcg", boot=boot)
    async with vm:
        await vm.run("uname -a")
        seconds = time.perf_counter() - began
        await vm.stop(timeout=0)
    return seconds


def _replaced(old: str, new: str, word: str) -> str:
    return word.replace(old, new)


async def commands(rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of one command, with asyncssh alone and through `run()`, in turns."""
    alone: list[float] = []
    through: list[float] = []
    async with AsyncSmolVM(accel="tcg") as vm:
        await vm.run("true")
        access = await vm.ssh_access()
        known: Any = ([asyncssh.import_public_key(access.host_key)], [], [])
        async with asyncssh.connect(
            "127.0.0.1",
            access.port,
            username=access.user,
            client_keys=[asyncssh.import_private_key(access.private_key)],
            known_hosts=known,
            config=None,
            agent_path=None,
        ) as connection:
            for _ in range(rounds):
                began = time.perf_counter()
                await connection.run("true", check=True)
                middle = time.perf_counter()
                await vm.run("true")
                alone.append(middle - began)
                through.append(time.perf_counter() - middle)
    return alone, through


async def measure_boot(rounds: int, *, variants: bool = False) -> Results:
    """Measure starts up to the first answer, and the gain of each choice of the machine."""
    image = await build_debian()
    alone: list[float] = []
    cold: list[float] = []
    warm: list[float] = []
    varied: dict[str, list[float]] = {}
    await ours("warm")  # imports; makes the snapshot of the ready guest
    for _ in range(rounds):
        alone.append(await bare(image))
        cold.append(await ours("cold"))
        warm.append(await ours("warm"))
        for name, (old, new) in VARIANTS.items() if variants else ():
            figure = await bare(image, partial(_replaced, old, new))
            varied.setdefault(f"bare, {name}", []).append(figure)
    booted = Figure("async with, run(), boot='cold'", cold, "s")
    results = Results("Start of the built-in Linux, to the first command's answer")
    results.compare(
        "cold boot of the built-in Linux, to the first command's answer",
        Figure("bare QEMU, tuned by hand, polled over SSH", alone, "s"),
        booted,
    )
    results.compare(
        "warm start of the built-in Linux, to the first command's answer; the floor is a cold boot",
        booted,
        Figure("async with, run()", warm, "s"),
        budget=WARM,
    )
    for name, values in varied.items():
        results.compare(name, Figure("bare", alone, "s"), Figure(name, values, "s"), headline=False)
    return results


async def measure_commands(rounds: int) -> Results:
    """Measure the round trip of a command on an open connection."""
    alone, through = await commands(rounds)
    results = Results("Round trip of a command")
    results.compare(
        "command (`true`) in the built-in Linux, started warm",
        Figure("asyncssh alone, on an open connection", alone),
        Figure("run()", through),
    )
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", "--rounds", type=int, default=5)
    parser.add_argument("--variants", action="store_true", help="measure the gain of each choice")
    parser.add_argument("--commands", type=int, default=30, help="rounds of one command")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", AcceleratorWarning)
    found = [
        asyncio.run(measure_boot(options.rounds, variants=options.variants)),
        asyncio.run(measure_commands(options.commands)),
    ]
    for results in found:
        if options.json:
            print(json.dumps(results.to_json(), indent=1))
        else:
            show(results.to_json())


if __name__ == "__main__":
    main()
